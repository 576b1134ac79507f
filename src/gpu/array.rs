//! Between ndarray and burn tensors, with sizes checked before anything is sent.

use super::device::Opened;
use super::product::Engine;
use crate::error::{Error, Result};
use crate::linalg::Real;
use burn::tensor::{Tensor, TensorData};
use ndarray::{Array2, ArrayView2};

impl<B: Engine> Opened<B> {
    /// Refuses a buffer of `elements` f32 numbers that the device cannot hold.
    ///
    /// # Errors
    /// [`Error::TooLarge`] with both sizes.
    pub fn check_buffer(&self, what: &str, elements: usize) -> Result<()> {
        let needed = elements as u128 * size_of::<f32>() as u128;
        let limit = u128::from(self.info.max_buffer_bytes);
        if needed > limit {
            return Err(Error::TooLarge {
                what: format!("{what} on {}", self.info),
                needed,
                limit,
                unit: "bytes",
            });
        }
        Ok(())
    }

    /// Copies a matrix to the device as f32.
    ///
    /// # Errors
    /// [`Error::InvalidParam`] for a matrix without entries, [`Error::TooLarge`] above the device's
    /// largest buffer.
    pub fn upload<T: Real>(&self, name: &str, a: ArrayView2<T>) -> Result<Tensor<B, 2>> {
        if a.is_empty() {
            return Err(Error::invalid(
                name,
                format!("{:?}", a.dim()),
                "an empty matrix cannot be sent to a device",
            ));
        }
        self.check_buffer(name, a.len())?;
        let numbers: Vec<f32> = a.iter().map(|x| x.widen() as f32).collect();
        Ok(Tensor::from_data(TensorData::new(numbers, [a.nrows(), a.ncols()]), &self.device))
    }

    /// Copies a matrix back.
    ///
    /// # Errors
    /// [`Error::Device`] when the device failed in what made it.
    pub fn download(&self, a: Tensor<B, 2>) -> Result<Array2<f32>> {
        let [rows, columns] = a.dims();
        let data = a.try_into_data().map_err(|e| self.failure("reading a tensor back", &e))?;
        let numbers = data.convert::<f32>().into_vec::<f32>();
        let numbers =
            numbers.map_err(|e| self.failure("reading a tensor back", &format!("{e:?}")))?;
        Array2::from_shape_vec((rows, columns), numbers)
            .map_err(|e| self.failure("reading a tensor back", &e))
    }
}
