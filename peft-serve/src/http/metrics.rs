//! Numbers for Prometheus.

use std::fmt;
use std::sync::Arc;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric};
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry as Numbers;

use crate::handle::Engine;
use crate::registry::Registry;

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Labels {
    route: String,
    status: u16,
}

/// What is counted over HTTP, and what the engine and the registry say of themselves.
pub(super) struct Metrics {
    numbers: Numbers,
    requests: Family<Labels, Counter>,
    first_token: Histogram,
    whole: Histogram,
}

impl Metrics {
    pub(super) fn new(engine: Engine, registry: Arc<Registry>) -> Self {
        let mut numbers = Numbers::with_prefix("peft");
        let requests = Family::<Labels, Counter>::default();
        let times = || Histogram::new(exponential_buckets(0.005, 2.0, 16));
        let (first_token, whole) = (times(), times());
        numbers.register("http_requests", "Requests by route and status", requests.clone());
        numbers.register("first_token_seconds", "From a request to its first token", first_token.clone());
        numbers.register("answer_seconds", "From a request to the end of its answer", whole.clone());
        numbers.register_collector(Box::new(Inside { engine, registry }));
        Self { numbers, requests, first_token, whole }
    }

    pub(super) fn request(&self, route: &str, status: u16) {
        self.requests.get_or_create(&Labels { route: route.to_owned(), status }).inc();
    }

    pub(super) fn first_token(&self, seconds: f64) {
        self.first_token.observe(seconds);
    }

    pub(super) fn whole(&self, seconds: f64) {
        self.whole.observe(seconds);
    }

    pub(super) fn text(&self) -> Result<String, fmt::Error> {
        let mut text = String::new();
        encode(&mut text, &self.numbers)?;
        Ok(text)
    }
}

/// Numbers that are read when they are asked for.
#[derive(Debug)]
struct Inside {
    engine: Engine,
    registry: Arc<Registry>,
}

impl Collector for Inside {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let (engine, registry) = (self.engine.stats(), self.registry.stats());
        for (name, help, value) in [
            ("waiting_requests", "Requests that wait for a place in the batch", engine.waiting as u64),
            ("running_sequences", "Sequences in the batch", engine.running as u64),
            ("cache_used_tokens", "Rows of the key-value cache in use", engine.cache_used as u64),
            ("cache_tokens", "Rows of the key-value cache", engine.cache_tokens as u64),
            ("adapters_registered", "Adapters that can be asked for", registry.registered as u64),
            ("adapters_resident", "Adapters in memory", registry.resident as u64),
            ("adapters_resident_bytes", "Bytes of adapters in memory", registry.bytes),
        ] {
            let gauge = ConstGauge::new(i64::try_from(value).unwrap_or(i64::MAX));
            gauge.encode(encoder.encode_descriptor(name, help, None, gauge.metric_type())?)?;
        }
        for (name, help, value) in [
            ("steps", "Passes through the model", engine.steps),
            ("prompt_tokens", "Tokens of prompts that were read", engine.prompt_tokens),
            ("written_tokens", "Tokens that were written", engine.written_tokens),
            ("sequences_finished", "Sequences that came to their end", engine.finished),
            ("sequences_failed", "Sequences that failed", engine.failed),
            ("sequences_cancelled", "Sequences whose reader went away", engine.cancelled),
            ("adapters_opened", "Adapters that were read from files", registry.opened),
            ("adapters_evicted", "Adapters that the budget put out of memory", registry.evicted),
        ] {
            let counter = ConstCounter::new(value);
            counter.encode(encoder.encode_descriptor(name, help, None, counter.metric_type())?)?;
        }
        Ok(())
    }
}
