//! The program, as a user runs it.

mod command_line;
#[path = "../common/pages.rs"]
mod pages;
mod readme_commands;
mod training_commands;
mod validate_command;
