//! Pages, notebooks and steps for contributors stay true. Only in the repository: the package has
//! no figures or notebooks.

#![cfg(feature = "cli")] // which brings the reader of tables

mod contributing;
mod notebooks;
mod notes_index;
#[path = "../common/pages.rs"]
mod pages;
