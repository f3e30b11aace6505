//! Adapters that do another thing for each task (Poly, multitask prompt tuning), and the route of a batch whose sequences are of
//! several.
//!
//! A task is a view of the adapter ([`Adapter::for_task`]): the same parameters, with the task settled. A batch that mixes tasks
//! is then one that mixes adapters, and layers, models and attention know nothing of tasks.

use std::sync::Arc;

use crate::ctx::{Ctx, Route};
use crate::error::{Error, Result};
use crate::set::{Adapter, AdapterSet};

/// A set and a route in which each sequence goes through the view of its own task.
#[derive(Debug, Clone)]
pub struct ByTask {
    adapters: AdapterSet,
    route: Route,
}

impl ByTask {
    /// For a packed batch whose sequence `i` holds tokens `bounds[i]..bounds[i + 1]` and is of task `tasks[i]`; `None` where no
    /// adapter of the route depends on the task. Sequences are runs of their own even where neighbours share a task, since
    /// each draws its own random numbers.
    ///
    /// # Errors
    /// A sequence without a task, a task that the adapter does not have, or a sequence of several adapters.
    pub fn of(bounds: &[usize], tasks: &[usize], ctx: &Ctx<'_>) -> Result<Option<Self>> {
        let of_slot = |slot: usize| ctx.adapters.adapter(slot).filter(|adapter| adapter.tasks().is_some());
        let mut slots = ctx.route.slots_of(0..bounds.last().copied().unwrap_or(0)).flatten();
        if !slots.any(|slot| of_slot(slot).is_some()) {
            return Ok(None);
        }
        let (mut adapters, mut runs, mut views) = (ctx.adapters.clone(), Vec::new(), Vec::new());
        for (i, pair) in bounds.windows(2).enumerate() {
            let &[from, to] = pair else { continue };
            let mut slots = ctx.route.slots_of(from..to);
            let slot = slots.next().flatten();
            if slots.any(|other| other != slot) {
                return Err(Error::msg("a sequence goes through several adapters, one of which depends on its task"));
            }
            let Some((slot, adapter)) = slot.and_then(|slot| Some((slot, of_slot(slot)?))) else {
                runs.push((from..to, slot));
                continue;
            };
            let task = match (tasks.get(i), adapter.tasks()) {
                (Some(task), _) => *task,
                (None, Some(1)) => 0,
                (None, _) => return Err(Error::config("task_id", "is not given, and the adapter has several tasks")),
            };
            let known = views.iter().find(|(of, _)| *of == (slot, task)).map(|(_, view)| *view);
            let view = match known {
                Some(view) => view,
                None => {
                    let name = format!("{} (slot {slot}, task {task})", adapters.names().nth(slot).unwrap_or(""));
                    adapters = adapters.with(name.clone(), Arc::new(adapter.for_task(task)?));
                    let view = adapters.slot(&name);
                    views.push(((slot, task), view));
                    view
                }
            };
            runs.push((from..to, view));
        }
        Ok(Some(Self { adapters, route: Route::Rows(runs) }))
    }

    /// `ctx` with this set and this route.
    #[must_use]
    pub fn ctx<'b>(&'b self, ctx: &Ctx<'b>) -> Ctx<'b> {
        Ctx { adapters: &self.adapters, route: &self.route, ..*ctx }
    }
}

/// Checks a task against how many an adapter has.
pub(crate) fn check_task(task: usize, tasks: Option<usize>) -> Result<()> {
    match tasks {
        None => Err(Error::msg("the adapter is the same for every task; name none")),
        Some(tasks) if task >= tasks => {
            let last = tasks.saturating_sub(1);
            Err(Error::msg(format!("task {task} is not one of the adapter's, 0 to {last}")))
        }
        Some(_) => Ok(()),
    }
}

impl Adapter {
    /// Refuses an adapter that depends on the task where none is settled.
    ///
    /// # Errors
    /// For an adapter of several tasks.
    pub fn settled(self) -> Result<Self> {
        match self.tasks() {
            None => Ok(self),
            Some(1) => self.for_task(0),
            Some(n) => {
                let last = n.saturating_sub(1);
                Err(Error::msg(format!("the adapter has {n} tasks, 0 to {last}; choose one of them")))
            }
        }
    }
}
