/*!
Bottleneck adapters: small networks `up(act(down(x)))` where a sublayer joins the residual stream, with AdapterHub's config
keys, placements and defaults (`adapters` 1.3, `configuration/adapter_config.py` and `methods/modeling.py`).

| preset | where | paper |
|---|---|---|
| `seq_bn` | behind the feed-forward network | Pfeiffer et al. 2020, arXiv:2005.00052 |
| `double_seq_bn` | behind attention and the feed-forward network | Houlsby et al. 2019, arXiv:1902.00751 |
| `compacter`, `compacter++` | as `double_seq_bn`, as `seq_bn`, with projections of Kronecker products | Mahabadi et al. 2021, arXiv:2106.04647 |
| `adapter_plus` | behind the feed-forward network, on the stream alone, with a factor a channel | Steitz & Roth 2024, arXiv:2406.06820 |
| `par_bn`, `scaled_par_bn` | beside the feed-forward network | He et al. 2022, arXiv:2110.04366 |

With any of them, `leave_out` names blocks without an adapter (AdapterDrop, Rücklé et al. 2021, arXiv:2010.11918). AdapterHub's
invertible adapters are refused.

[`BottleneckConfig`] is read from a recipe or an `adapter_config.json`; [`BottleneckConfig::build`] puts a [`Bottleneck`] at the end
of the sublayers that it names. It has a nonlinearity, so no weight of the base can take it in.
*/

pub mod adapterhub;
mod bottleneck;
mod build;
pub mod compose;
mod config;
pub mod linear;
mod phm;
pub mod reft;

pub use bottleneck::{Bottleneck, Placement, Residual};
pub use config::BottleneckConfig;
