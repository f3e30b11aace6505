//! The same function in candle tensor operations: sequences one by one, whole matrices of logits, `f32` inside.

use candle_core::{D, DType, Device, IndexOp, Result, Tensor};

use super::plan::{AttentionPlan, SequenceSpan, Sight};

/// One sequence in `f32`, heads first: `q [kv_heads, group·nq, head_dim]`, `k` and `v` `[kv_heads, n, head_dim]` with the
/// prefix first.
struct Sequence<'a> {
    plan: &'a AttentionPlan,
    nq: usize,
    n: usize,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    /// 1 where a query sees a key, `[nq, n]`; `None` if it is 1 everywhere.
    mask: Option<Tensor>,
    /// What is added to logits, `[heads, nq, n]`, and the rows of the table that it is made of, pair by pair.
    bias: Option<(Tensor, Vec<u32>)>,
    /// Rows of the batch's queries and keys.
    q_rows: Vec<u32>,
    k_rows: Vec<u32>,
}

/// A relative bias `[distances, heads]`, and its row for distance 0.
pub(super) type Bias<'a> = Option<(&'a Tensor, usize)>;

/// The result, `[q_tokens, heads·head_dim]`.
pub(super) fn forward(plan: &AttentionPlan, q: &Tensor, k: &Tensor, v: &Tensor, bias: Bias<'_>) -> Result<Tensor> {
    let mut rows = Rows::default();
    for s in sequences(plan, q, k, v, bias) {
        let s = s?;
        let (probabilities, _) = s.probabilities()?;
        rows.push(s.queries(&probabilities.matmul(&s.v)?)?, &s.q_rows);
    }
    rows.assemble(q)
}

/// Gradients of q, k, v and the bias as far as `needs` asks for them.
pub(super) fn backward(
    plan: &AttentionPlan,
    [q, k, v]: [&Tensor; 3],
    bias: Bias<'_>,
    res: &Tensor,
    grad: &Tensor,
    needs: [bool; 4],
) -> Result<[Option<Tensor>; 4]> {
    let [needs_q, needs_k, needs_v, needs_bias] = needs;
    let (mut dq, mut dk, mut dv, mut d_bias) = (Rows::default(), Rows::default(), Rows::default(), Rows::default());
    for s in sequences(plan, q, k, v, bias) {
        let s = s?;
        let (p, d_cap) = s.probabilities()?;
        let d_out = s.heads_first(grad)?;
        if needs_v {
            dv.push(s.keys(&p.t()?.contiguous()?.matmul(&d_out)?)?, &s.k_rows);
        }
        if !needs_q && !needs_k && !needs_bias {
            continue;
        }
        let delta = (&d_out * s.heads_first(res)?)?.sum_keepdim(D::Minus1)?;
        let dp = d_out.matmul(&s.v.t()?.contiguous()?)?;
        let mut ds = (p * dp.broadcast_sub(&delta)?)?;
        if let Some(d_cap) = d_cap {
            ds = (ds * d_cap)?;
        }
        if needs_bias && let Some((_, rows)) = &s.bias {
            let pairs = ds.reshape((plan.heads, s.nq * s.n))?.t()?.contiguous()?;
            d_bias.push(pairs, rows);
        }
        let ds = (ds * f64::from(plan.scale))?;
        if needs_q {
            dq.push(s.queries(&ds.matmul(&s.k)?)?, &s.q_rows);
        }
        if needs_k {
            dk.push(s.keys(&ds.t()?.contiguous()?.matmul(&s.q)?)?, &s.k_rows);
        }
    }
    let finish = |needed: bool, rows: Rows, like: &Tensor| needed.then(|| rows.assemble(like)).transpose();
    let d_bias = bias.filter(|_| needs_bias).map(|(bias, _)| d_bias.assemble(bias)).transpose()?;
    Ok([finish(needs_q, dq, q)?, finish(needs_k, dk, k)?, finish(needs_v, dv, v)?, d_bias])
}

/// The sequences that have queries and keys, made when they are asked for.
fn sequences<'a>(
    plan: &'a AttentionPlan,
    q: &'a Tensor,
    k: &'a Tensor,
    v: &'a Tensor,
    bias: Bias<'a>,
) -> impl Iterator<Item = Result<Sequence<'a>>> {
    let busy = |s: &&SequenceSpan| !s.queries.is_empty() && s.keys.len() + s.prefix.len() > 0;
    plan.sequences.iter().filter(busy).map(move |span| {
        let (nq, n) = (span.queries.len(), span.prefix.len() + span.keys.len());
        let keys = |t: &Tensor| -> Result<Tensor> {
            let t = Tensor::cat(&[t.i(span.prefix.clone())?, t.i(span.keys.clone())?], 0)?.to_dtype(DType::F32)?;
            t.reshape((n, plan.kv_heads, plan.head_dim))?.transpose(0, 1)?.contiguous()
        };
        let mut s = Sequence {
            plan,
            nq,
            n,
            q: q.clone(),
            k: keys(k)?,
            v: keys(v)?,
            mask: mask(plan, span, q.device())?,
            bias: bias.map(|(bias, zero)| biases(plan, span, bias, zero)).transpose()?,
            q_rows: span.queries.clone().map(|i| i as u32).collect(),
            k_rows: span.prefix.clone().chain(span.keys.clone()).map(|i| i as u32).collect(),
        };
        s.q = s.heads_first(q)?;
        Ok(s)
    })
}

/// The biases of all pairs of one sequence. Pairs that do not see each other have any row of the table: the mask hides them.
fn biases(plan: &AttentionPlan, span: &SequenceSpan, bias: &Tensor, zero: usize) -> Result<(Tensor, Vec<u32>)> {
    let (nq, n) = (span.queries.len(), span.prefix.len() + span.keys.len());
    let last = bias.dim(0)?.saturating_sub(1) as isize;
    let row = |query: usize, key: usize| {
        let position = (query + n) as isize - nq as isize;
        (zero as isize + key as isize - position).clamp(0, last) as u32
    };
    let rows: Vec<u32> = (0..nq).flat_map(|i| (0..n).map(move |j| row(i, j))).collect();
    let pairs = bias.index_select(&Tensor::new(rows.as_slice(), bias.device())?, 0)?.to_dtype(DType::F32)?;
    Ok((pairs.t()?.contiguous()?.reshape((plan.heads, nq, n))?, rows))
}

fn mask(plan: &AttentionPlan, span: &SequenceSpan, device: &Device) -> Result<Option<Tensor>> {
    let (nq, prefix, n) = (span.queries.len(), span.prefix.len(), span.prefix.len() + span.keys.len());
    let (before, own) = (Sight::prefix(plan, span), Sight::own(plan, span));
    if (0..nq).all(|i| before.keys_of(i).len() + own.keys_of(i).len() == n) {
        return Ok(None);
    }
    let mut mask = vec![0f32; nq * n];
    for (i, row) in mask.chunks_exact_mut(n).enumerate() {
        row[before.keys_of(i)].fill(1.0);
        row[prefix..][own.keys_of(i)].fill(1.0);
    }
    Tensor::from_vec(mask, (nq, n), device).map(Some)
}

fn packed(t: &Tensor, heads: usize, rows: usize, head_dim: usize) -> Result<Tensor> {
    t.reshape((heads, rows, head_dim))?.transpose(0, 1)?.contiguous()?.reshape((rows, heads * head_dim))
}

impl Sequence<'_> {
    /// This sequence's rows of a tensor like q, as `[kv_heads, group·nq, head_dim]`.
    fn heads_first(&self, t: &Tensor) -> Result<Tensor> {
        let (plan, nq) = (self.plan, self.nq);
        let first = self.q_rows.first().map_or(0, |i| *i as usize);
        t.narrow(0, first, nq)?
            .to_dtype(DType::F32)?
            .reshape((nq, plan.heads, plan.head_dim))?
            .transpose(0, 1)?
            .contiguous()?
            .reshape((plan.kv_heads, plan.group() * nq, plan.head_dim))
    }

    /// Back from `[kv_heads, group·nq, head_dim]` to packed rows of queries.
    fn queries(&self, t: &Tensor) -> Result<Tensor> {
        packed(t, self.plan.heads, self.nq, self.plan.head_dim)
    }

    /// Back from `[kv_heads, n, head_dim]` to packed rows of keys.
    fn keys(&self, t: &Tensor) -> Result<Tensor> {
        packed(t, self.plan.kv_heads, self.n, self.plan.head_dim)
    }

    /// Probabilities `[kv_heads, group·nq, n]`, and the derivative of the soft cap where there is one.
    fn probabilities(&self) -> Result<(Tensor, Option<Tensor>)> {
        let plan = self.plan;
        let mut logits = (self.q.matmul(&self.k.t()?.contiguous()?)? * f64::from(plan.scale))?;
        let mut d_cap = None;
        if let Some(cap) = plan.softcap {
            let t = (logits / f64::from(cap))?.tanh()?;
            d_cap = Some((1.0 - t.sqr()?)?);
            logits = (t * f64::from(cap))?;
        }
        let logits = logits.reshape((plan.heads, self.nq, self.n))?;
        let logits = match &self.bias {
            Some((bias, _)) => (logits + bias)?,
            None => logits,
        };
        let logits = match &self.mask {
            Some(mask) => logits.broadcast_add(&((mask - 1.0)? * 1e30)?)?,
            None => logits,
        };
        let mut p = logits.broadcast_sub(&logits.max_keepdim(D::Minus1)?)?.exp()?;
        if let Some(mask) = &self.mask {
            p = p.broadcast_mul(mask)?;
        }
        // A row that sees no key is all zeros, and stays so.
        let sum = p.sum_keepdim(D::Minus1)?.maximum(f64::from(f32::MIN_POSITIVE))?;
        let p = p.broadcast_div(&sum)?.reshape((plan.kv_heads, plan.group() * self.nq, self.n))?;
        Ok((p, d_cap))
    }
}

/// Rows of a result, in pieces.
#[derive(Default)]
struct Rows {
    pieces: Vec<Tensor>,
    ids: Vec<u32>,
}

impl Rows {
    fn push(&mut self, piece: Tensor, ids: &[u32]) {
        self.pieces.push(piece);
        self.ids.extend_from_slice(ids);
    }

    /// A tensor like `like`: rows that several pieces have are summed, rows that none has are zeros.
    fn assemble(self, like: &Tensor) -> Result<Tensor> {
        let rows = like.dim(0)?;
        if self.pieces.is_empty() {
            return like.zeros_like();
        }
        let all = Tensor::cat(&self.pieces, 0)?;
        let in_order = self.ids.len() == rows && self.ids.iter().enumerate().all(|(i, id)| i == *id as usize);
        let all = if in_order {
            all
        } else {
            let ids = Tensor::from_vec(self.ids, all.dim(0)?, like.device())?;
            Tensor::zeros(like.shape(), DType::F32, like.device())?.index_add(&ids, &all, 0)?
        };
        all.to_dtype(like.dtype())
    }
}
