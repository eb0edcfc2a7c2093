//! Guest physical memory: regions on memfd, the dirty bitmap and the code-page hook.
