/*!
PEFT adapters in models that know nothing of adapters.

Whatever builds itself from a candle `VarBuilder` (the models of candle-transformers do, and most servers' own) asks it for weights by
the names that the checkpoint has. [`inject`] answers with weights into which adapters of any method are merged, so the model's
code stays as it is and costs nothing more per token:

```no_run
# use std::sync::Arc;
# use candle_core::{DType, Device, Tensor};
# use candle_transformers::models::llama::{Cache, Config, Llama};
# fn main() -> Result<(), Box<dyn std::error::Error>> {
# let config: Config = Config::config_7b_v1(false);
# let ids = Tensor::zeros((1, 4), DType::U32, &Device::Cpu)?;
use peft_inject::{Base, inject};

let base = Arc::new(Base::open("models/smollm2")?);
let open = |folder: &str| peft_train::methods::open(folder.as_ref(), &*base).map(|made| Arc::new(made.adapter));
let (pirate, poet) = (open("adapters/pirate")?, open("adapters/poet")?);
let (model, mut injected) = inject(&base, vec![pirate], DType::F32, &Device::Cpu, |vb| Llama::load(vb, &config))?;

// Another adapter in the same model, where its weights are shared with the builder; the probe finds that out.
injected.probe(|| model.forward(&ids, 0, &mut Cache::new(false, DType::F32, &config, &Device::Cpu)?))?;
injected.swap(vec![poet])?;
# Ok(())
# }
```

For one model with many adapters at a time there is peft-serve, which runs models of peft-models.
*/

mod base;
mod inject;
mod swap;

pub use base::Base;
pub use inject::{Injected, inject};
