//! One door to matrix products, element-wise kernels, decompositions, norms and Khatri-Rao
//! products.

pub mod attention_tile;
pub mod decompositions;
pub mod elementwise;
pub mod gemm;
pub mod khatri_rao;
pub mod lanes;
pub mod norms;
pub mod pivoted_cholesky;
mod product_kernels;
pub mod real;
pub mod reduce;
pub mod row_dots;
pub mod scratch;
mod small_product;
pub mod tile;
pub mod workers;

pub use gemm::{product, product_into};
pub use real::Real;
pub use scratch::Scratch;
pub use workers::on_workers;
