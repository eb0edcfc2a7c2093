//! Comparisons with the host's own execution.

mod against_host;
mod generate;
mod images;
mod modes;
mod rules;
