//! The examples for users of the library run, and what they assert holds.

#[path = "../../examples/notebook_gradients.rs"]
mod notebook_gradients;
#[path = "../../examples/own_factorization.rs"]
mod own_factorization;
#[path = "../../examples/own_head.rs"]
mod own_head;
#[path = "../../examples/own_method.rs"]
mod own_method;

#[test]
fn own_head_runs() {
    own_head::main().unwrap();
}

#[test]
fn own_method_runs() {
    own_method::main().unwrap();
}

#[test]
fn own_factorization_runs() {
    own_factorization::main().unwrap();
}

#[test]
fn the_notebook_cells_run() {
    notebook_gradients::main().unwrap();
}
