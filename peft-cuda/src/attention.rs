//! Attention over packed sequences (`kernels/attention.cuh`).

use std::ops::Range;

use crate::launch::{Args, Element, Launch, Operand, count};

/// Rows of a bias that a block makes the gradient of.
const BAND: usize = 64;
/// More keys than a sequence has: no limit. Sums of three still fit a 32-bit number.
const FAR: usize = 1 << 29;

/// Where one sequence lies in the packed queries and keys of a batch.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Span {
    /// Its rows of `q`, of no other sequence.
    pub queries: Range<usize>,
    /// Its own rows of `k` and `v`, of no other sequence's own.
    pub keys: Range<usize>,
    /// Rows of `k` and `v` that stand before its own; may be shared.
    pub prefix: Range<usize>,
}

/// Heads, masks and sequences, with the meaning of `AttentionPlan` of `peft-kernels`.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// Query heads.
    pub heads: usize,
    /// Key heads; divides `heads`.
    pub kv_heads: usize,
    /// Elements of a head, up to [`Plan::WIDEST`].
    pub head_dim: usize,
    /// Factor of `q·k`.
    pub scale: f32,
    /// Whether a query sees no key behind its position.
    pub causal: bool,
    /// The sliding window, in keys.
    pub window: Option<usize>,
    /// `c · tanh(logit / c)` in place of a logit.
    pub softcap: Option<f32>,
    /// The sequences.
    pub sequences: Vec<Span>,
}

/// What kernels read of a plan: tables of 32-bit numbers that the caller copies to the device, once for all layers of a batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tables {
    /// Of each sequence, and of each run of queries that no sequence has, 6 numbers.
    pub spans: Vec<u32>,
    /// Of each tile of queries its span and its first query.
    pub query_tiles: Vec<u32>,
    /// Of each tile of keys its first row, its rows, its first user and its users.
    pub key_tiles: Vec<u32>,
    /// Of each user of a tile 4 numbers.
    pub users: Vec<u32>,
    tokens: usize,
}

/// Addresses of the tables.
#[derive(Debug, Clone, Copy)]
pub struct TableAddresses {
    /// [`Tables::spans`].
    pub spans: u64,
    /// [`Tables::query_tiles`].
    pub query_tiles: u64,
    /// [`Tables::key_tiles`].
    pub key_tiles: u64,
    /// [`Tables::users`].
    pub users: u64,
}

/// What attention reads.
#[derive(Debug, Clone, Copy)]
pub struct Inputs {
    /// Queries, `[tokens, heads, head_dim]`.
    pub q: Operand,
    /// Keys, `[rows, kv_heads, head_dim]`, of the type of `q`.
    pub k: u64,
    /// Values, like `k`.
    pub v: u64,
    /// The relative bias `[distances, heads]` of the type of `q`; 0 for none.
    pub bias: u64,
    /// The row of the bias for distance 0.
    pub zero: usize,
    /// How many rows the bias has.
    pub distances: usize,
    /// For `f32`: products of TF32 numbers, rather than of their 22-bit sums.
    pub tf32: bool,
}

/// What the backward pass reads besides.
#[derive(Debug, Clone, Copy)]
pub struct Upstream {
    /// The result.
    pub out: u64,
    /// Its gradient.
    pub grad: u64,
    /// What [`Plan::forward`] left, `[heads, tokens]`.
    pub lse: u64,
    /// Room for as much again.
    pub delta: u64,
}

/// Where gradients go; those whose address is 0 are not made.
#[derive(Debug, Clone, Copy, Default)]
pub struct Gradients {
    /// Like `q`.
    pub q: u64,
    /// Like `k`.
    pub k: u64,
    /// Like `v`.
    pub v: u64,
    /// Like the bias.
    pub bias: u64,
}

/// Sizes as `Tiles` in the kernels has them.
struct Tiles {
    /// The class of head sizes.
    class: usize,
    /// Rows of a block's result.
    rows: usize,
    /// Keys that it takes at a time.
    keys: usize,
    /// Queries that it takes at a time for the gradient of keys.
    queries: usize,
    /// Bytes of a row in shared memory.
    pitch: usize,
}

impl Tiles {
    fn of(head_dim: usize, element: Element) -> Self {
        let (class, wide) = (head_dim.next_power_of_two().max(64), element.size() == 4);
        let (rows, keys, queries) = match (class, wide) {
            (64, true) => (64, 32, 32),
            (128, true) => (64, 32, 16),
            (_, true) => (32, 16, 16),
            (64, false) => (64, 64, 64),
            (128, false) => (64, 64, 32),
            (_, false) => (64, 32, 16),
        };
        Self { class, rows, keys, queries, pitch: class * element.size() + 16 }
    }
}

impl Plan {
    /// The largest head that kernels take.
    pub const WIDEST: usize = 256;

    /// How far a query sees to the left and to the right of its position.
    fn sight(&self) -> (usize, usize) {
        let window = self.window.map(|w| w.min(FAR));
        match (self.causal, window) {
            (true, Some(w)) => (w.saturating_sub(1), 0),
            (true, None) => (FAR, 0),
            (false, Some(w)) => (w, w),
            (false, None) => (FAR, FAR),
        }
    }

    /// For `tokens` queries and `key_rows` rows of keys. Every row of a result belongs to a tile, so that kernels write all of
    /// them: zeros where no sequence has the row.
    #[must_use]
    pub fn tables(&self, element: Element, tokens: usize, key_rows: usize) -> Tables {
        let rows = Tiles::of(self.head_dim, element).rows;
        let mut spans: Vec<Span> = self.sequences.iter().filter(|s| !s.queries.is_empty()).cloned().collect();
        let mut taken: Vec<Range<usize>> = spans.iter().map(|s| s.queries.clone()).collect();
        taken.sort_by_key(|r| r.start);
        let mut end = 0;
        for next in taken.into_iter().chain(std::iter::once(tokens..tokens)) {
            if end < next.start {
                spans.push(Span { queries: end..next.start, ..Span::default() });
            }
            end = end.max(next.end);
        }
        let mut query_tiles = Vec::new();
        for (i, span) in spans.iter().enumerate() {
            // The longest rows of a causal mask first, so that the card ends evenly.
            let firsts = (0..span.queries.len()).step_by(rows).rev();
            query_tiles.extend(firsts.flat_map(|first| [count(i), count(first)]));
        }
        let (key_tiles, users) = self.key_tiles(rows, key_rows);
        let ranges = spans.iter().flat_map(|s| [&s.queries, &s.keys, &s.prefix]);
        let spans = ranges.flat_map(|r| [count(r.start), count(r.len())]).collect();
        Tables { spans, query_tiles, key_tiles, users, tokens }
    }

    /// Rows of keys cut where the set of sequences that see them changes.
    fn key_tiles(&self, rows: usize, key_rows: usize) -> (Vec<u32>, Vec<u32>) {
        let seen: Vec<(Range<usize>, [u32; 4])> = self
            .sequences
            .iter()
            .filter(|s| !s.queries.is_empty())
            .flat_map(|s| {
                let (queries, keys, prefix) = (s.queries.len(), s.keys.len(), s.prefix.len());
                let user = |range: &Range<usize>, before: usize| {
                    let shift = before as i64 - range.start as i64;
                    let offset = (keys + prefix) as i64 - queries as i64;
                    let signed = |n: i64| (n as i32).cast_unsigned();
                    (range.clone(), [count(s.queries.start), count(queries), signed(shift), signed(offset)])
                };
                [user(&s.prefix, 0), user(&s.keys, prefix)]
            })
            .filter(|(range, _)| !range.is_empty())
            .collect();
        let mut cuts: Vec<usize> = seen.iter().flat_map(|(r, _)| [r.start, r.end]).chain([0, key_rows]).collect();
        cuts.sort_unstable();
        cuts.dedup();
        let (mut tiles, mut users) = (Vec::new(), Vec::new());
        for run in cuts.windows(2) {
            let first_user = users.len() / 4;
            let here = seen.iter().filter(|(r, _)| r.start <= run[0] && run[1] <= r.end);
            users.extend(here.flat_map(|(_, user)| *user));
            let of_run = count(users.len() / 4 - first_user);
            for row in (run[0]..run[1]).step_by(rows) {
                tiles.extend([count(row), count(rows.min(run[1] - row)), count(first_user), of_run]);
            }
        }
        (tiles, users)
    }

    fn launch(&self, name: &str, element: Element, grid: [usize; 3], shared: usize, args: Args) -> Launch {
        let tiles = Tiles::of(self.head_dim, element);
        let file = match element {
            Element::F32 => "attention_f32",
            Element::Bf16 => "attention_bf16",
            Element::F16 => "attention_f16",
        };
        Launch {
            file,
            kernel: format!("attention_{name}_{}_{}", element.name(), tiles.class),
            grid: grid.map(count),
            threads: count(tiles.rows * 2),
            shared: count(shared),
            args,
        }
    }

    fn shape(&self, args: Args, tokens: usize, inputs: &Inputs, addresses: &[u64]) -> Args {
        let (left, right) = self.sight();
        let (inner, outer) = match self.softcap {
            Some(cap) => (self.scale / cap, cap * std::f32::consts::LOG2_E),
            None => (self.scale * std::f32::consts::LOG2_E, 0.0),
        };
        let addresses = addresses.iter().chain([&inputs.q.address, &inputs.k, &inputs.v]);
        let whole = (self.head_dim * inputs.q.element.size()).is_multiple_of(16);
        let vector = whole && addresses.into_iter().all(|a| a.is_multiple_of(16));
        let args = args.int(count(tokens)).int(count(self.heads)).int(count(self.kv_heads)).int(count(self.head_dim));
        let args = args.float(self.scale).float(inner).float(outer).int(count(left)).int(count(right));
        args.int(count(inputs.zero)).int(u32::from(vector)).int(u32::from(!inputs.tf32))
    }

    /// The result into `out` (like `q`) and each row's log-sum-exp in base 2 into `lse` (`[heads, tokens]`, `f32`; +∞ for a query
    /// that sees no key, which gives zeros).
    #[must_use]
    pub fn forward(&self, inputs: &Inputs, out: u64, lse: u64, tables: &Tables, at: TableAddresses) -> Launch {
        let tiles = Tiles::of(self.head_dim, inputs.q.element);
        let args = Args::new().long(inputs.q.address).long(inputs.k).long(inputs.v).long(inputs.bias);
        let args = args.long(out).long(lse).long(at.query_tiles).long(at.spans);
        let grid = [tables.query_tiles.len() / 2, self.heads, 1];
        let shared = (tiles.rows + 2 * tiles.keys) * tiles.pitch;
        let args = self.shape(args, tables.tokens, inputs, &[]);
        self.launch("forward", inputs.q.element, grid, shared, args)
    }

    /// The gradients that have an address, in order.
    #[must_use]
    pub fn backward(
        &self,
        inputs: &Inputs,
        up: Upstream,
        to: Gradients,
        tables: &Tables,
        at: TableAddresses,
    ) -> Vec<Launch> {
        let (element, tiles) = (inputs.q.element, Tiles::of(self.head_dim, inputs.q.element));
        let first = Args::new().long(inputs.q.address).long(inputs.k).long(inputs.v).long(inputs.bias);
        let first = first.long(up.grad).long(up.lse).long(up.delta);
        let shape = |args| self.shape(args, tables.tokens, inputs, &[up.grad]);
        let query_tiles = tables.query_tiles.len() / 2;
        let by_queries = (2 * tiles.rows + 2 * tiles.keys) * tiles.pitch;

        let delta = shape(Args::new().long(up.out).long(up.grad).long(up.delta));
        let mut launches = vec![Launch {
            kernel: format!("attention_delta_{}", element.name()),
            threads: 256,
            ..self.launch("", element, [(tables.tokens * self.heads).div_ceil(8), 1, 1], 0, delta)
        }];
        if to.k != 0 || to.v != 0 {
            let args = first.clone().long(to.k).long(to.v).long(at.key_tiles).long(at.users);
            // Wide heads' results are made in two halves.
            let grid = [tables.key_tiles.len() / 4, self.kv_heads, self.head_dim.div_ceil(tiles.class.min(128))];
            let shared = (2 * tiles.rows + 2 * tiles.queries) * tiles.pitch + 2 * tiles.queries * 4;
            launches.push(self.launch("keys", element, grid, shared, shape(args)));
        }
        if to.q != 0 {
            let args = first.clone().long(to.q).long(at.query_tiles).long(at.spans);
            launches.push(self.launch("queries", element, [query_tiles, self.heads, 1], by_queries, shape(args)));
        }
        if to.bias != 0 {
            let args = first.long(to.bias).long(at.query_tiles).long(at.spans).int(count(query_tiles));
            let grid = [inputs.distances.div_ceil(BAND), self.heads, 1];
            let args = shape(args.int(count(inputs.distances)));
            launches.push(self.launch("bias", element, grid, by_queries, args));
        }
        launches
    }
}
