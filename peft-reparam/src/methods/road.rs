//! RoAd (Liao & Monz 2024, arXiv:2409.00119; PEFT `tuners/road`): pairs of outputs are rotated and scaled.

use candle_core::Tensor;
use peft_core::{ConfigKeys, Error, Result, Role};
use serde_json::json;

use super::{Kind, Made, Method, size};
use crate::change::{Change, Formula, exactly};
use crate::start::Start;

pub(crate) const KIND: Kind = Kind {
    name: "road",
    peft_type: "ROAD",
    label: "RoAd",
    keys: || json!({"group_size": 64, "init_weights": true, "variant": "road_1"}),
    only_default: &[],
    patterns: &[],
    read: |keys| Ok(Box::new(Road::read(keys)?)),
};

/// How many angles and lengths an output pair has.
#[derive(Debug, Clone, Copy)]
enum Variant {
    /// One for both.
    One,
    /// One for each output.
    Two,
    /// Two for each output: of the output itself and of its partner.
    Four,
}

#[derive(Debug)]
struct Road {
    variant: Variant,
    group: usize,
    identity: bool,
}

impl Road {
    fn read(keys: ConfigKeys<'_>) -> Result<Self> {
        let variant = match keys.text("variant")? {
            None | Some("road_1") => Variant::One,
            Some("road_2") => Variant::Two,
            Some("road_4") => Variant::Four,
            Some(other) => {
                let message = format!("`{other}` is none of \"road_1\", \"road_2\", \"road_4\"");
                return Err(Error::config("variant", message));
            }
        };
        let group = size(keys, "group_size", 64)?;
        if !group.is_multiple_of(2) {
            return Err(Error::config("group_size", format!("{group} is odd, and its outputs are paired")));
        }
        Ok(Self { variant, group, identity: keys.flag("init_weights", true)? })
    }
}

impl Method for Road {
    fn module(&self, mut start: Start<'_>) -> Result<Made> {
        let (out, _) = start.dims();
        if !out.is_multiple_of(self.group) {
            return Err(start.misfit("group_size", format!("{} does not divide its {out} outputs", self.group)));
        }
        let n = match self.variant {
            Variant::One => out / 2,
            Variant::Two => out,
            Variant::Four => out * 2,
        };
        if self.identity {
            start.constant("road_theta", 0.0, n, Role::NoDecay)?;
            start.constant("road_alpha", 1.0, n, Role::NoDecay)?;
        } else {
            start.normal("road_theta", (0.0, 0.5), n, Role::NoDecay)?;
            start.normal("road_alpha", (1.0, 0.5), n, Role::NoDecay)?;
        }
        Ok((start.finish(Turns { variant: self.variant, group: self.group, out }, 0.0), Vec::new()))
    }
}

/// `α·cos θ` and `α·sin θ` for each output.
#[derive(Debug)]
struct Turns {
    variant: Variant,
    group: usize,
    out: usize,
}

impl Turns {
    /// What each output takes of a parameter, for its own value and for its partner's.
    fn of_outputs(&self, t: &Tensor) -> Result<(Tensor, Tensor)> {
        let groups = self.out / self.group;
        match self.variant {
            Variant::Two => Ok((t.clone(), t.clone())),
            Variant::One => {
                let half = t.reshape((groups, 1, self.group / 2))?;
                let both = Tensor::cat(&[&half, &half], 1)?.reshape(self.out)?;
                Ok((both.clone(), both))
            }
            Variant::Four => {
                let t = t.reshape((groups, 2, self.group))?;
                let part = |i: usize| t.narrow(1, i, 1)?.contiguous()?.reshape(self.out);
                Ok((part(0)?, part(1)?))
            }
        }
    }
}

impl Formula for Turns {
    fn change(&self, parameters: &[Tensor]) -> Result<Change> {
        let [theta, alpha] = exactly(parameters)?;
        let ((own, other), (own_length, other_length)) = (self.of_outputs(theta)?, self.of_outputs(alpha)?);
        let (cos, sin) = ((own_length * own.cos()?)?, (other_length * other.sin()?)?);
        Ok(Change::PairedOutput { cos, sin, group: self.group })
    }
}
