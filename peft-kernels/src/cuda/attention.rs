//! Attention over packed sequences.

use std::sync::{Arc, Mutex, PoisonError, Weak};

use candle_core::cuda::cudarc::driver::{CudaSlice, DevicePtr, SyncOnDrop};
use candle_core::cuda::{DeviceId, gemm_reduced_precision_f32};
use candle_core::{Result, Tensor};
use peft_cuda::Element;
use peft_cuda::attention::{Gradients, Inputs, Plan, Span, TableAddresses, Tables, Upstream};

use super::{Made, View};
use crate::AttentionPlan;

/// A relative bias and its row for distance 0.
pub(crate) type Bias<'a> = Option<(&'a View<'a>, usize)>;

/// A plan as kernels read it, with its tables on a card.
struct Uploaded {
    plan: Plan,
    tables: Tables,
    /// Spans, tiles of queries, tiles of keys, users.
    lists: [CudaSlice<u32>; 4],
}

/// What a plan's tables depend on besides the plan.
type Key = (DeviceId, Element, usize, usize);

struct InUse {
    plan: Weak<AttentionPlan>,
    key: Key,
    made: Arc<Uploaded>,
}

/// Tables of the plans that are in use: every layer of a batch has the same.
static IN_USE: Mutex<Vec<InUse>> = Mutex::new(Vec::new());

fn uploaded(plan: &Arc<AttentionPlan>, q: &View<'_>, k: &View<'_>) -> Result<Arc<Uploaded>> {
    let (tokens, key_rows) = (q.shape.dims2()?.0, k.shape.dims2()?.0);
    let key = (q.device.id(), q.operand.element, tokens, key_rows);
    let mut all = IN_USE.lock().unwrap_or_else(PoisonError::into_inner);
    let is_it = |u: &&InUse| u.key == key && std::ptr::eq(u.plan.as_ptr(), Arc::as_ptr(plan));
    if let Some(found) = all.iter().find(is_it) {
        return Ok(found.made.clone());
    }
    // An address is not used again while a weak pointer holds it.
    all.retain(|u| u.plan.strong_count() > 0);
    let AttentionPlan { heads, kv_heads, head_dim, scale, causal, window, softcap, ref sequences } = **plan;
    let span =
        |s: &crate::SequenceSpan| Span { queries: s.queries.clone(), keys: s.keys.clone(), prefix: s.prefix.clone() };
    let sequences = sequences.iter().map(span).collect();
    let of_kernels = Plan { heads, kv_heads, head_dim, scale, causal, window, softcap, sequences };
    let tables = of_kernels.tables(q.operand.element, tokens, key_rows);
    let lists = [&tables.spans, &tables.query_tiles, &tables.key_tiles, &tables.users];
    let [spans, query_tiles, key_tiles, users] = lists.map(|list| q.upload(list));
    let lists = [spans?, query_tiles?, key_tiles?, users?];
    let made = Arc::new(Uploaded { plan: of_kernels, tables, lists });
    all.push(InUse { plan: Arc::downgrade(plan), key, made: made.clone() });
    Ok(made)
}

impl Uploaded {
    /// Addresses of the tables, to be held until kernels are launched.
    fn addresses(&self) -> (TableAddresses, [SyncOnDrop<'_>; 4]) {
        let [(spans, a), (query_tiles, b), (key_tiles, c), (users, d)] =
            self.lists.each_ref().map(|list| list.device_ptr(list.stream()));
        (TableAddresses { spans, query_tiles, key_tiles, users }, [a, b, c, d])
    }
}

fn inputs([q, k, v]: [&View<'_>; 3], bias: Bias<'_>) -> Option<Inputs> {
    let element = q.operand.element;
    let alike = [Some(k), Some(v), bias.map(|b| b.0)].into_iter().flatten().all(|t| t.operand.element == element);
    alike.then(|| Inputs {
        q: q.operand,
        k: k.operand.address,
        v: v.operand.address,
        bias: bias.map_or(0, |(bias, _)| bias.operand.address),
        zero: bias.map_or(0, |(_, zero)| zero),
        distances: bias.map_or(0, |(bias, _)| bias.shape.dims().first().copied().unwrap_or(0)),
        tf32: gemm_reduced_precision_f32(),
    })
}

/// The result and its log-sum-exps.
pub(crate) fn forward(plan: &Arc<AttentionPlan>, args: [&View<'_>; 3], bias: Bias<'_>) -> Result<Option<(Made, Made)>> {
    let [q, k, _] = args;
    let Some(inputs) = inputs(args, bias).filter(|_| plan.head_dim <= Plan::WIDEST) else { return Ok(None) };
    let uploaded = uploaded(plan, q, k)?;
    let (mut out, mut lse) = (q.like()?, q.room((plan.heads, q.shape.dims2()?.0), Element::F32)?);
    let (at, _held) = uploaded.addresses();
    let to = (out.operand.address, lse.operand.address);
    let launch = uploaded.plan.forward(&inputs, to.0, to.1, &uploaded.tables, at);
    q.run(&[launch], &mut [&mut out, &mut lse])?;
    Ok(Some((out, lse)))
}

/// Gradients of q, k, v and the bias as far as `needs` asks for them, from the result, its gradient and its log-sum-exps.
pub(crate) fn backward(
    plan: &Arc<AttentionPlan>,
    args: [&View<'_>; 3],
    bias: Bias<'_>,
    [out, grad, lse]: [&View<'_>; 3],
    needs: &[bool],
) -> Result<Option<Vec<Option<Tensor>>>> {
    let [q, k, v] = args;
    let element = q.operand.element;
    let Some(inputs) = inputs(args, bias).filter(|_| [out, grad].iter().all(|t| t.operand.element == element)) else {
        return Ok(None);
    };
    let uploaded = uploaded(plan, q, k)?;
    let delta = q.room(lse.shape.clone(), Element::F32)?;
    let sources = [Some(q), Some(k), Some(v), bias.map(|(bias, _)| bias)];
    let mut made = Vec::with_capacity(needs.len());
    for (source, needed) in sources.into_iter().zip(needs) {
        made.push(source.filter(|_| *needed).map(View::like).transpose()?);
    }
    let at = |i: usize| made.get(i).and_then(Option::as_ref).map_or(0, |m| m.operand.address);
    let to = Gradients { q: at(0), k: at(1), v: at(2), bias: at(3) };
    let up = Upstream {
        out: out.operand.address,
        grad: grad.operand.address,
        lse: lse.operand.address,
        delta: delta.operand.address,
    };
    let (tables, _held) = uploaded.addresses();
    let launches = uploaded.plan.backward(&inputs, up, to, &uploaded.tables, tables);
    q.run(&launches, &mut made.iter_mut().flatten().collect::<Vec<_>>())?;
    Ok(Some(made.into_iter().map(|m| m.map(Made::tensor)).collect()))
}
