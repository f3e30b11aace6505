//! An adapter made of several bottleneck adapters: one behind the other, their mean, or AdapterFusion's attention to what they make
//! (Pfeiffer et al. 2021, arXiv:2005.00247), with the formulas, keys and starts of AdapterHub's package
//! (`adapters/methods/bottleneck.py`, `adapters/methods/modeling.py`, 1.3).
//!
//! It is one adapter to everything else: at each place stands a module made of the parts' modules there. What is saved holds
//! the parts too, those that are not trained as fixed tensors, so that it opens without the folders that it was made of.
//!
//! - A stack: each reads what the one before made, at its own placement.
//! - A mean: all read the same `x`, as the first is placed, and `Σ wᵢ yᵢ` goes on, with weights that sum to 1.
//! - A fusion: all read the same `x`, as the last is placed, and each makes `uᵢ`. With `q = Q x`, `kᵢ = K uᵢ` and `vᵢ = V uᵢ` the
//!   result is `Σ softmax(q·kᵢ) vᵢ` on the last one's residual connection. `V` starts as the identity and is held near it
//!   (`regularization`).

mod attention;
mod build;
mod config;
mod regularizer;
mod setup;

use candle_core::Tensor;
use peft_core::kernels;
use peft_core::{Ctx, Error, Join, Parameter, Result, SublayerModule};

use crate::bottleneck::Bottleneck;
use attention::Attention;

pub use config::{ComposeConfig, Kind};
pub(crate) use config::{FUSION_KEYS, PEFT_TYPES, fusion_settings};
pub(crate) use setup::{SETUP, Setup};

/// How the adapters of one place are put together; leaves are numbers of [`Composed::members`].
#[derive(Debug, Clone, PartialEq)]
enum Node {
    One(usize),
    Stack(Vec<Node>),
    Average(Vec<(f64, Node)>),
    Fuse(Vec<Node>),
}

impl Node {
    /// The adapter that decides where a mean reads.
    fn first(&self) -> Option<usize> {
        match self {
            Self::One(i) => Some(*i),
            Self::Stack(list) | Self::Fuse(list) => list.first().and_then(Self::first),
            Self::Average(list) => list.first().and_then(|(_, part)| part.first()),
        }
    }

    /// The adapter whose placement is that of the whole.
    fn last(&self) -> Option<usize> {
        match self {
            Self::One(i) => Some(*i),
            Self::Stack(list) | Self::Fuse(list) => list.last().and_then(Self::last),
            Self::Average(list) => list.last().and_then(|(_, part)| part.last()),
        }
    }
}

/// One of the adapters that are put together.
#[derive(Debug)]
struct Member {
    adapter: Bottleneck,
    trained: bool,
}

/// Several adapters at the end of one sublayer.
#[derive(Debug)]
pub(crate) struct Composed {
    members: Vec<Member>,
    node: Node,
    /// For the fusion, where there is one.
    attention: Option<Attention>,
}

/// What an adapter reads, and its residual connection, both `[tokens, hidden]`.
type Entered = [Tensor; 2];

impl Composed {
    fn member(&self, i: Option<usize>) -> Result<&Member> {
        i.and_then(|i| self.members.get(i)).ok_or_else(|| Error::msg("a composition of adapters that are not there"))
    }

    /// What member `i` reads where the sublayer made `hidden`.
    fn enter(&self, i: Option<usize>, hidden: &Tensor, join: &Join<'_>, ctx: &Ctx<'_>) -> Result<Entered> {
        let hidden = hidden.to_dtype(join.output.dtype())?;
        self.member(i)?.adapter.reads(&Join { output: &hidden, ..*join }, ctx)
    }

    /// What `node` makes of `hidden`, in place of it.
    fn output(&self, node: &Node, hidden: &Tensor, join: &Join<'_>, ctx: &Ctx<'_>) -> Result<Tensor> {
        match node {
            Node::One(i) => self.single(*i, &self.enter(Some(*i), hidden, join, ctx)?, ctx),
            Node::Stack(parts) => self.through(parts, hidden, join, ctx),
            Node::Average(parts) => {
                let entered = self.enter(node.first(), hidden, join, ctx)?;
                let outputs = parts.iter().map(|(weight, part)| {
                    let output = match part {
                        Node::One(i) => self.single(*i, &entered, ctx)?,
                        other => self.output(other, &entered[0], join, ctx)?,
                    };
                    Ok((output * *weight)?)
                });
                sum(outputs)
            }
            Node::Fuse(parts) => {
                let entered = self.enter(node.last(), hidden, join, ctx)?;
                let attention = self.attention.as_ref().ok_or_else(|| Error::msg("a fusion without its attention"))?;
                let query =
                    if attention.query_before_norm { hidden.to_dtype(entered[0].dtype())? } else { entered[0].clone() };
                let made = parts.iter().map(|part| self.made(part, &entered[0], join, ctx));
                attention.forward(&query, made.collect::<Result<Vec<_>>>()?, &entered[1], ctx)
            }
        }
    }

    /// What `parts`, one behind the other, make of `hidden`.
    fn through(&self, parts: &[Node], hidden: &Tensor, join: &Join<'_>, ctx: &Ctx<'_>) -> Result<Tensor> {
        parts.iter().try_fold(hidden.clone(), |hidden, part| self.output(part, &hidden, join, ctx))
    }

    /// Member `i` with its residual connection.
    fn single(&self, i: usize, entered: &Entered, ctx: &Ctx<'_>) -> Result<Tensor> {
        let member = self.member(Some(i))?;
        member.adapter.with_residual(entered, &member.ctx(ctx))
    }

    /// What a part of a fusion makes of `read`, without a residual connection.
    fn made(&self, part: &Node, read: &Tensor, join: &Join<'_>, ctx: &Ctx<'_>) -> Result<Tensor> {
        let scaled = |i: usize, read: &Tensor| {
            let member = self.member(Some(i))?;
            member.adapter.scaled(read, &member.ctx(ctx))
        };
        match part {
            Node::One(i) => scaled(*i, read),
            Node::Stack(parts) => {
                let Some((Node::One(last), before)) = parts.split_last() else {
                    return Err(Error::msg("a fusion of more than stacks"));
                };
                let hidden = self.through(before, read, join, ctx)?;
                let [read, _] = self.enter(Some(*last), &hidden, join, ctx)?;
                scaled(*last, &read)
            }
            Node::Average(_) | Node::Fuse(_) => Err(Error::msg("a fusion of more than stacks")),
        }
    }
}

impl Member {
    fn ctx<'a>(&self, ctx: &Ctx<'a>) -> Ctx<'a> {
        if self.trained { *ctx } else { ctx.untracked() }
    }
}

fn sum(parts: impl Iterator<Item = Result<Tensor>>) -> Result<Tensor> {
    let mut sum: Option<Tensor> = None;
    for part in parts {
        let part = part?;
        sum = Some(match sum {
            Some(sum) => kernels::add(&sum, &part)?,
            None => part,
        });
    }
    sum.ok_or_else(|| Error::msg("a composition of no adapters"))
}

impl SublayerModule for Composed {
    fn join(&self, sublayer: &Join<'_>, ctx: &Ctx<'_>) -> Result<Tensor> {
        let output = self.output(&self.node, sublayer.output, sublayer, ctx)?;
        self.member(self.node.last())?.adapter.behind(&output, sublayer, ctx)
    }

    fn reads_sequences(&self, ctx: &Ctx<'_>) -> bool {
        self.members.iter().any(|member| member.adapter.reads_sequences(ctx))
    }

    fn parameters(&self) -> Vec<&Parameter> {
        let trained = self.members.iter().filter(|member| member.trained);
        let of_members = trained.flat_map(|member| member.adapter.parameters());
        of_members.chain(self.attention.iter().flat_map(Attention::parameters)).collect()
    }
}

#[cfg(test)]
mod tests;
