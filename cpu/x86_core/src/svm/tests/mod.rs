mod events;
mod hostile;
mod paging;
mod rig;
mod switch;
