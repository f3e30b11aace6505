//! How an operation of this crate is run and differentiated.
//!
//! A [`DiffOp`] states the same function twice, once as a fused CPU kernel over `f32` slices and once in candle tensor
//! operations that run on any device and float type, and gives its gradient. Some have kernels for CUDA besides, which go
//! before the neutral form. [`apply`] makes it one graph node, so that
//! what the graph keeps alive is the arguments and the result, nothing between. The neutral form is also what the tests
//! hold the fused form against.
//!
//! candle calls `bwd` for arguments that need no gradient as well, and hands over tracked tensors. Both traps are dealt
//! with here once: [`DiffOp::backward`] sees detached tensors and `needs[i]`.

use std::sync::Arc;

use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::op::BackpropOp;
use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, CustomOp2, CustomOp3, DType, Device, Layout, MetalStorage, Result, Shape,
    Storage, Tensor, Var,
};

use crate::cpu::View;
use crate::tape::{self, Keeps};

/// A differentiable function of one to three tensors.
pub(crate) trait DiffOp: Send + Sync + 'static {
    /// The name that errors and profiles show.
    const NAME: &'static str;

    /// What the backward pass reads. Of what it does not, it sees the shape only.
    const KEEPS: Keeps;

    /// Whether making the result again costs less than keeping it until the backward pass.
    const CHEAP: bool = false;

    /// Whether running it leaves something for the backward pass beside the result ([`Self::remember`]).
    const REMEMBERS: bool = false;

    /// The fused CPU kernel: contiguous `f32` arguments, the result's elements and shape.
    fn cpu(&self, args: &[View<'_>]) -> Result<(Vec<f32>, Shape)>;

    /// The same function in tensor operations, for every other device and float type. Arguments are untracked.
    fn neutral(&self, args: &[Tensor]) -> Result<Tensor>;

    /// The CUDA kernel, if there is one for these arguments: contiguous, on one card.
    #[cfg(feature = "cuda")]
    fn cuda(&self, _args: &[crate::cuda::View<'_>]) -> Result<Option<crate::cuda::Made>> {
        Ok(None)
    }

    /// [`Self::backward`] by CUDA kernels, if there are some for these arguments.
    #[cfg(feature = "cuda")]
    fn cuda_backward(
        &self,
        _args: &[Tensor],
        _res: &Tensor,
        _grad: &Tensor,
        _needs: &[bool],
    ) -> Result<Option<Vec<Option<Tensor>>>> {
        Ok(None)
    }

    /// Makes what running it leaves for the backward pass; the result is not wanted. Arguments are untracked and contiguous.
    fn remember(&self, args: &[Tensor]) -> Result<()>
    where
        Self: Sized,
    {
        compute(self, args).map(drop)
    }

    /// Gradients of the arguments for which `needs` is true. All tensors are untracked and contiguous.
    fn backward(&self, args: &[Tensor], res: &Tensor, grad: &Tensor, needs: &[bool]) -> Result<Vec<Option<Tensor>>>;
}

/// Applies `op` to one to three tensors, all on one device: as an entry of a recording ([`crate::record`]) where one is
/// under way, as a node of candle's graph otherwise, and without either where nothing is tracked.
pub(crate) fn apply<T: DiffOp>(op: T, args: &[&Tensor]) -> Result<Tensor> {
    let args = args.iter().map(|a| a.contiguous()).collect::<Result<Vec<_>>>()?;
    if !args.iter().any(Tensor::track_op) {
        return compute(&op, &args)?.tensor();
    }
    let op = match tape::run(op, &args) {
        Ok(result) => return result,
        Err(op) => op,
    };
    match args.as_slice() {
        [a] => a.apply_op1(Node(op)),
        [a, b] => a.apply_op2(b, Node(op)),
        [a, b, c] => a.apply_op3(b, c, Node(op)),
        _ => candle_core::bail!("{}: an operation takes one to three tensors, not {}", T::NAME, args.len()),
    }
}

/// What an operation made, before it is a tensor.
pub(crate) enum Value {
    Fused(Vec<f32>, Shape),
    Neutral(Tensor),
}

impl Value {
    /// An untracked tensor.
    pub(crate) fn tensor(self) -> Result<Tensor> {
        match self {
            Self::Fused(data, shape) => Tensor::from_vec(data, shape, &Device::Cpu),
            Self::Neutral(t) => Ok(t),
        }
    }

    /// A variable without a history.
    pub(crate) fn variable(self) -> Result<Tensor> {
        match self {
            Self::Fused(data, shape) => {
                Ok(Tensor::from_storage(Storage::Cpu(CpuStorage::F32(data)), shape, BackpropOp::none(), true))
            }
            Self::Neutral(t) => Ok(Var::from_tensor(&t)?.into_inner()),
        }
    }
}

/// Runs an operation on untracked contiguous arguments, fused where that is possible.
pub(crate) fn compute<T: DiffOp>(op: &T, args: &[Tensor]) -> Result<Value> {
    #[cfg(feature = "cuda")]
    if let Some(made) = crate::cuda::compute(op, args)? {
        return Ok(Value::Neutral(made));
    }
    if !args.iter().all(is_cpu_f32) {
        return Ok(Value::Neutral(op.neutral(args)?.contiguous()?));
    }
    let storages: Vec<_> = args.iter().map(Tensor::storage_and_layout).collect();
    let views = storages.iter().map(|(s, l)| match &**s {
        Storage::Cpu(s) => View::new(s, l),
        _ => candle_core::bail!("{}: a CPU kernel got a tensor of another device", T::NAME),
    });
    let (data, shape) = op.cpu(&views.collect::<Result<Vec<_>>>()?)?;
    Ok(Value::Fused(data, shape))
}

/// Gradients of the arguments for which `needs` is true. All tensors are untracked and contiguous.
pub(crate) fn gradients<T: DiffOp>(
    op: &T,
    args: &[Tensor],
    res: &Tensor,
    grad: &Tensor,
    needs: &[bool],
) -> Result<Vec<Option<Tensor>>> {
    #[cfg(feature = "cuda")]
    if let Some(grads) = op.cuda_backward(args, res, grad, needs)? {
        return Ok(grads);
    }
    op.backward(args, res, grad, needs)
}

/// Whether the fused CPU kernels apply to `t`.
pub(crate) fn is_cpu_f32(t: &Tensor) -> bool {
    t.device().is_cpu() && t.dtype() == DType::F32
}

struct Node<T>(T);

type Arg<'a, S> = (&'a S, &'a Layout);

impl<T: DiffOp> Node<T> {
    fn on_cpu(&self, args: &[Arg<'_, CpuStorage>]) -> Result<(CpuStorage, Shape)> {
        if args.iter().all(|(s, _)| s.dtype() == DType::F32) {
            let views = args.iter().map(|(s, l)| View::new(s, l)).collect::<Result<Vec<_>>>()?;
            let (out, shape) = self.0.cpu(&views)?;
            return Ok((CpuStorage::F32(out), shape));
        }
        self.neutrally(args, Storage::Cpu, |s| match s {
            Storage::Cpu(s) => Some(s),
            _ => None,
        })
    }

    /// Runs the neutral form on any backend. The storages are copied in and out once, since candle offers no way to
    /// lend a storage to a tensor.
    fn neutrally<S: BackendStorage>(
        &self,
        args: &[Arg<'_, S>],
        wrap: impl Fn(S) -> Storage,
        unwrap: impl Fn(&Storage) -> Option<&S>,
    ) -> Result<(S, Shape)>
    where
        S::Device: BackendDevice<Storage = S>,
    {
        let tensors = args
            .iter()
            .map(|(s, l)| {
                let mut copy = s.device().zeros_impl(l.shape(), s.dtype())?;
                s.copy_strided_src(&mut copy, 0, l)?;
                Ok(Tensor::from_storage(wrap(copy), l.shape().clone(), BackpropOp::none(), false))
            })
            .collect::<Result<Vec<_>>>()?;
        let out = self.0.neutral(&tensors)?.contiguous()?;
        let (storage, layout) = out.storage_and_layout();
        let Some(s) = unwrap(&storage) else {
            candle_core::bail!("{}: the result is on another device than the arguments", T::NAME)
        };
        let mut copy = s.device().zeros_impl(layout.shape(), s.dtype())?;
        s.copy_strided_src(&mut copy, 0, layout)?;
        Ok((copy, layout.shape().clone()))
    }

    fn on_cuda(&self, args: &[Arg<'_, CudaStorage>]) -> Result<(CudaStorage, Shape)> {
        #[cfg(feature = "cuda")]
        if let Some(made) = crate::cuda::compute_lent(&self.0, args)? {
            return Ok(made);
        }
        self.neutrally(args, Storage::Cuda, |s| match s {
            Storage::Cuda(s) => Some(s),
            _ => None,
        })
    }

    fn on_metal(&self, args: &[Arg<'_, MetalStorage>]) -> Result<(MetalStorage, Shape)> {
        self.neutrally(args, Storage::Metal, |s| match s {
            Storage::Metal(s) => Some(s),
            _ => None,
        })
    }

    fn gradients<const N: usize>(
        &self,
        args: [&Tensor; N],
        res: &Tensor,
        grad: &Tensor,
    ) -> Result<[Option<Tensor>; N]> {
        let needs = args.map(Tensor::track_op);
        let args = args.map(Tensor::detach);
        let grads = gradients(&self.0, &args, &res.detach(), &grad.detach().contiguous()?, &needs)?;
        let found = grads.len();
        let grads: [Option<Tensor>; N] = grads
            .try_into()
            .map_err(|_| candle_core::Error::Msg(format!("{}: {found} gradients for {N} arguments", T::NAME)))?;
        Ok(grads.map(|g| g.map(|g| g.detach())))
    }
}

impl<T: DiffOp> CustomOp1 for Node<T> {
    fn name(&self) -> &'static str {
        T::NAME
    }
    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> Result<(CpuStorage, Shape)> {
        self.on_cpu(&[(s, l)])
    }
    fn cuda_fwd(&self, s: &CudaStorage, l: &Layout) -> Result<(CudaStorage, Shape)> {
        self.on_cuda(&[(s, l)])
    }
    fn metal_fwd(&self, s: &MetalStorage, l: &Layout) -> Result<(MetalStorage, Shape)> {
        self.on_metal(&[(s, l)])
    }
    fn bwd(&self, a: &Tensor, res: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let [da] = self.gradients([a], res, grad)?;
        Ok(da)
    }
}

impl<T: DiffOp> CustomOp2 for Node<T> {
    fn name(&self) -> &'static str {
        T::NAME
    }
    fn cpu_fwd(&self, s1: &CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<(CpuStorage, Shape)> {
        self.on_cpu(&[(s1, l1), (s2, l2)])
    }
    fn cuda_fwd(&self, s1: &CudaStorage, l1: &Layout, s2: &CudaStorage, l2: &Layout) -> Result<(CudaStorage, Shape)> {
        self.on_cuda(&[(s1, l1), (s2, l2)])
    }
    fn metal_fwd(
        &self,
        s1: &MetalStorage,
        l1: &Layout,
        s2: &MetalStorage,
        l2: &Layout,
    ) -> Result<(MetalStorage, Shape)> {
        self.on_metal(&[(s1, l1), (s2, l2)])
    }
    fn bwd(&self, a: &Tensor, b: &Tensor, res: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let [da, db] = self.gradients([a, b], res, grad)?;
        Ok((da, db))
    }
}

impl<T: DiffOp> CustomOp3 for Node<T> {
    fn name(&self) -> &'static str {
        T::NAME
    }
    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
        s3: &CpuStorage,
        l3: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.on_cpu(&[(s1, l1), (s2, l2), (s3, l3)])
    }
    fn cuda_fwd(
        &self,
        s1: &CudaStorage,
        l1: &Layout,
        s2: &CudaStorage,
        l2: &Layout,
        s3: &CudaStorage,
        l3: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.on_cuda(&[(s1, l1), (s2, l2), (s3, l3)])
    }
    fn metal_fwd(
        &self,
        s1: &MetalStorage,
        l1: &Layout,
        s2: &MetalStorage,
        l2: &Layout,
        s3: &MetalStorage,
        l3: &Layout,
    ) -> Result<(MetalStorage, Shape)> {
        self.on_metal(&[(s1, l1), (s2, l2), (s3, l3)])
    }
    fn bwd(
        &self,
        a: &Tensor,
        b: &Tensor,
        c: &Tensor,
        res: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [da, db, dc] = self.gradients([a, b, c], res, grad)?;
        Ok((da, db, dc))
    }
}

/// Starts a backward pass at `y` with a gradient that came from elsewhere.
///
/// candle seeds `backward` with ones; `(y * dy).sum()` would cost a product, its gradient and a graph that keeps `dy`.
/// This node's result is one zero, and its gradient with respect to `y` is `dy` itself.
///
/// # Errors
/// When `dy` and `y` differ in shape or type.
pub fn seed(y: &Tensor, dy: &Tensor) -> Result<Tensor> {
    if y.shape() != dy.shape() || y.dtype() != dy.dtype() {
        candle_core::bail!(
            "seed: the gradient is {:?} {:?} but the output is {:?} {:?}",
            dy.dtype(),
            dy.shape(),
            y.dtype(),
            y.shape()
        );
    }
    y.apply_op1_arc(Arc::new(Box::new(Seed(dy.detach()))))
}

struct Seed(Tensor);

impl Seed {
    fn zero<S: BackendStorage>(s: &S) -> Result<(S, Shape)>
    where
        S::Device: BackendDevice<Storage = S>,
    {
        let shape = Shape::from(());
        Ok((s.device().zeros_impl(&shape, s.dtype())?, shape))
    }
}

impl CustomOp1 for Seed {
    fn name(&self) -> &'static str {
        "seed"
    }
    fn cpu_fwd(&self, s: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        Self::zero(s)
    }
    fn cuda_fwd(&self, s: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        Self::zero(s)
    }
    fn metal_fwd(&self, s: &MetalStorage, _: &Layout) -> Result<(MetalStorage, Shape)> {
        Self::zero(s)
    }
    fn bwd(&self, _: &Tensor, _: &Tensor, _: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(self.0.clone()))
    }
}
