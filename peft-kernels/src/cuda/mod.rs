//! The kernels of `peft-cuda` on candle's tensors, launched on the stream of their device without waiting for it.
//!
//! Every function here answers `None` where kernels do not apply, and the neutral form runs: other types or layouts, empty
//! tensors, cards before 8.0, `PEFT_CUDA_KERNELS=0`, and builds whose nvcc was a stand-in.

pub(crate) mod attention;
pub(crate) mod cross_entropy;
pub(crate) mod norm;
pub(crate) mod pointwise;
pub(crate) mod rotary;

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

use candle_core::backend::BackendDevice;
use candle_core::cuda::cudarc::driver::sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
use candle_core::cuda::cudarc::driver::{
    CudaFunction, CudaModule, CudaSlice, DevicePtr, DevicePtrMut, DriverError, LaunchConfig, PushKernelArg, SyncOnDrop,
};
use candle_core::cuda::cudarc::nvrtc::Ptx;
use candle_core::cuda::{CudaDevice, CudaStorageSlice, DeviceId, WrapErr};
use candle_core::op::BackpropOp;
use candle_core::{CudaStorage, DType, Layout, Result, Shape, Storage, Tensor};
use peft_cuda::{Element, IMAGES, Launch, Operand};

use crate::diff_op::DiffOp;

/// Dynamic shared memory that needs no leave.
const SHARED: u32 = 48 << 10;

/// A contiguous argument on a card.
pub(crate) struct View<'a> {
    /// Where it lies, and its type.
    pub(crate) operand: Operand,
    /// Its shape.
    pub(crate) shape: &'a Shape,
    device: &'a CudaDevice,
    /// Tells other streams, when it is dropped, that what was launched may still read.
    _reading: SyncOnDrop<'a>,
}

impl<'a> View<'a> {
    fn new(storage: &'a CudaStorage, layout: &'a Layout) -> Option<Self> {
        fn at<T>(slice: &CudaSlice<T>) -> (u64, SyncOnDrop<'_>) {
            slice.device_ptr(slice.stream())
        }
        let (start, end) = layout.contiguous_offsets()?;
        let (element, (address, reading)) = match &storage.slice {
            CudaStorageSlice::F32(s) => (Element::F32, at(s)),
            CudaStorageSlice::BF16(s) => (Element::Bf16, at(s)),
            CudaStorageSlice::F16(s) => (Element::F16, at(s)),
            _ => return None,
        };
        let operand = Operand { address: address + (start * element.size()) as u64, element };
        let view = Self { operand, shape: layout.shape(), device: &storage.device, _reading: reading };
        (start < end && usable(&storage.device)).then_some(view)
    }

    /// How many elements.
    pub(crate) fn len(&self) -> usize {
        self.shape.elem_count()
    }

    /// Room for a result like this one.
    pub(crate) fn like(&self) -> Result<Made> {
        self.room(self.shape.clone(), self.operand.element)
    }

    /// Room for a result on the same card.
    pub(crate) fn room(&self, shape: impl Into<Shape>, element: Element) -> Result<Made> {
        let (shape, dtype) = (
            shape.into(),
            match element {
                Element::F32 => DType::F32,
                Element::Bf16 => DType::BF16,
                Element::F16 => DType::F16,
            },
        );
        #[allow(unsafe_code)]
        // SAFETY: the kernel that the room is for writes all of it before anything reads it.
        let storage = unsafe { self.device.alloc_uninit(&shape, dtype)? };
        let mut made = Made { storage, shape, operand: Operand { address: 0, element } };
        made.operand.address = made.address();
        Ok(made)
    }

    /// A list of numbers on the same card.
    pub(crate) fn upload(&self, list: &[u32]) -> Result<CudaSlice<u32>> {
        // An empty list is not read, but has an address.
        self.device.cuda_stream().clone_htod(if list.is_empty() { &[0][..] } else { list }).w()
    }

    /// Launches kernels that write `made`.
    pub(crate) fn run(&self, launches: &[Launch], made: &mut [&mut Made]) -> Result<()> {
        for launch in launches {
            send(self.device, launch)
                .map_err(|e| candle_core::Error::Msg(format!("CUDA kernel {}: {e}", launch.kernel)))?;
        }
        // Other streams learn here that it was written.
        made.iter_mut().for_each(|m| _ = m.address());
        Ok(())
    }
}

/// A result.
pub(crate) struct Made {
    storage: CudaStorage,
    shape: Shape,
    /// Where it lies, and its type.
    pub(crate) operand: Operand,
}

impl Made {
    /// Where it lies; notes that its stream is writing it.
    fn address(&mut self) -> u64 {
        fn at<T>(slice: &mut CudaSlice<T>) -> u64 {
            let stream = slice.stream().clone();
            let (address, _writing) = slice.device_ptr_mut(&stream);
            address
        }
        match &mut self.storage.slice {
            CudaStorageSlice::F32(s) => at(s),
            CudaStorageSlice::BF16(s) => at(s),
            CudaStorageSlice::F16(s) => at(s),
            _ => 0,
        }
    }

    /// An untracked tensor.
    pub(crate) fn tensor(self) -> Tensor {
        Tensor::from_storage(Storage::Cuda(self.storage), self.shape, BackpropOp::none(), false)
    }
}

/// The result of an operation on tensors.
pub(crate) fn compute<T: DiffOp>(op: &T, args: &[Tensor]) -> Result<Option<Tensor>> {
    let made = with(&args.iter().collect::<Vec<_>>(), |views| op.cuda(views))?;
    Ok(made.map(Made::tensor))
}

/// The result of an operation on what candle lends.
pub(crate) fn compute_lent<T: DiffOp>(
    op: &T,
    args: &[(&CudaStorage, &Layout)],
) -> Result<Option<(CudaStorage, Shape)>> {
    let Some(views) = args.iter().map(|(s, l)| View::new(s, l)).collect::<Option<Vec<_>>>() else { return Ok(None) };
    Ok(op.cuda(&views)?.map(|made| (made.storage, made.shape)))
}

/// Lends tensors to `f`, if kernels take all of them.
pub(crate) fn with<R>(tensors: &[&Tensor], f: impl FnOnce(&[View<'_>]) -> Result<Option<R>>) -> Result<Option<R>> {
    let storages: Vec<_> = tensors.iter().map(|t| t.storage_and_layout()).collect();
    let mut views = Vec::with_capacity(tensors.len());
    for (storage, layout) in &storages {
        let Storage::Cuda(storage) = &**storage else { return Ok(None) };
        let Some(view) = View::new(storage, layout) else { return Ok(None) };
        views.push(view);
    }
    f(&views)
}

/// What is loaded on each card.
#[derive(Default)]
struct Loaded {
    usable: HashMap<DeviceId, bool>,
    modules: HashMap<(DeviceId, &'static str), Arc<CudaModule>>,
    functions: HashMap<(DeviceId, String), CudaFunction>,
}

static LOADED: LazyLock<Mutex<Loaded>> = LazyLock::new(Mutex::default);

/// Whether kernels run on this card.
fn usable(device: &CudaDevice) -> bool {
    static WANTED: LazyLock<bool> = LazyLock::new(|| {
        std::env::var_os("PEFT_CUDA_KERNELS").is_none_or(|v| v != "0") && IMAGES.iter().all(|i| !i.bytes.is_empty())
    });
    let capable = || device.cuda_stream().context().compute_capability().is_ok_and(|(major, _)| major >= 8);
    let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
    *WANTED && *loaded.usable.entry(device.id()).or_insert_with(capable)
}

fn function(device: &CudaDevice, launch: &Launch) -> std::result::Result<CudaFunction, DriverError> {
    let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
    let key = (device.id(), launch.kernel.clone());
    if let Some(function) = loaded.functions.get(&key) {
        return Ok(function.clone());
    }
    let of_file = (device.id(), launch.file);
    let module = match loaded.modules.entry(of_file) {
        Entry::Occupied(module) => module.into_mut(),
        Entry::Vacant(empty) => {
            let image = IMAGES.iter().find(|i| i.name == launch.file).map_or(&[][..], |i| i.bytes);
            empty.insert(device.cuda_stream().context().load_module(Ptx::from_binary(image.to_vec()))?)
        }
    };
    let function = module.load_function(&launch.kernel)?;
    if launch.shared > SHARED {
        // The same for all launches of a kernel.
        function.set_attribute(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, launch.shared.cast_signed())?;
    }
    loaded.functions.insert(key, function.clone());
    Ok(function)
}

fn send(device: &CudaDevice, launch: &Launch) -> std::result::Result<(), DriverError> {
    if launch.is_empty() {
        return Ok(());
    }
    let (function, stream) = (function(device, launch)?, device.cuda_stream());
    let mut builder = stream.launch_builder(&function);
    for word in launch.args.words() {
        builder.arg(word);
    }
    let [x, y, z] = launch.grid;
    let config =
        LaunchConfig { grid_dim: (x, y, z), block_dim: (launch.threads, 1, 1), shared_mem_bytes: launch.shared };
    #[allow(unsafe_code)]
    // SAFETY: addresses are of views and results that outlive the call, on the stream that frees them; sizes are theirs.
    unsafe { builder.launch(config) }.map(drop)
}
