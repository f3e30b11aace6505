//! Looking rows up, and putting trained rows or columns in the place of frozen ones.

use candle_core::{DType, Device, Result, Shape, Tensor};

use crate::cpu::{self, View, for_row_blocks, new_rows};
use crate::diff_op::{DiffOp, apply, is_cpu_f32};
use crate::tape::Keeps;

/// Rows `ids` of `table` (`[vocab, hidden]`), as `[tokens, hidden]` in the table's type.
///
/// A frozen table costs a gather. A tracked one gets a dense gradient, each row the sum over its tokens in their order.
///
/// # Errors
/// Names an id that the table has no row for.
pub fn embedding(ids: &[u32], table: &Tensor) -> Result<Tensor> {
    let (vocab, _) = table.dims2()?;
    if let Some((at, id)) = ids.iter().enumerate().find(|(_, id)| **id as usize >= vocab) {
        candle_core::bail!("embedding: id {id} at token {at} is outside the table of {vocab} rows");
    }
    if is_cpu_f32(table) {
        return apply(Embedding(ids.to_vec()), &[table]);
    }
    gather(table, ids)
}

/// `base` (`[tokens, hidden]`) with `base[token] = rows[row]` for each `(token, row)` of `which`; `rows` is
/// `[k, hidden]`.
///
/// The gradient of a row is the sum over the tokens that show it; that of a replaced row of `base` is zero. This is how
/// PEFT's `trainable_token_indices` work (`tuners/trainable_tokens/layer.py`).
///
/// # Errors
/// When shapes do not fit, an index is out of range, or a token is replaced twice.
pub fn replace_rows(base: &Tensor, rows: &Tensor, which: &[(usize, usize)]) -> Result<Tensor> {
    let ((tokens, hidden), (k, width)) = (base.dims2()?, rows.dims2()?);
    if hidden != width {
        candle_core::bail!("replace_rows: rows are {width} wide but the base is {hidden}");
    }
    let mut source = vec![None; tokens];
    for &(token, row) in which {
        let Some(slot) = source.get_mut(token) else {
            candle_core::bail!("replace_rows: token {token} is outside the base of {tokens} rows")
        };
        if row >= k {
            candle_core::bail!("replace_rows: row {row} is outside the {k} given rows");
        }
        if slot.replace(row).is_some() {
            candle_core::bail!("replace_rows: token {token} is replaced twice");
        }
    }
    // Tracked rows that no token shows still belong to the graph: their gradient is zero, not absent.
    if which.is_empty() && !rows.track_op() {
        return Ok(base.clone());
    }
    apply(ReplaceRows { source }, &[base, &rows.to_dtype(base.dtype())?])
}

/// `logits` (`[n, vocab]`) with column `which[j]` replaced by column `j` of `cols` (`[n, k]`): the logits of trained
/// tokens under a tied head. Gradients go to both; that of a replaced column of `logits` is zero.
///
/// # Errors
/// When shapes do not fit, an index is out of range, or a column is replaced twice.
pub fn replace_columns(logits: &Tensor, cols: &Tensor, which: &[usize]) -> Result<Tensor> {
    let ((n, vocab), (rows, k)) = (logits.dims2()?, cols.dims2()?);
    if n != rows || k != which.len() {
        candle_core::bail!(
            "replace_columns: columns are [{rows}, {k}], but {} of [{n}, {vocab}] are to be replaced",
            which.len()
        );
    }
    let mut seen = std::collections::HashSet::new();
    for &column in which {
        if column >= vocab {
            candle_core::bail!("replace_columns: column {column} is outside the vocabulary of {vocab}");
        }
        if !seen.insert(column) {
            candle_core::bail!("replace_columns: column {column} is replaced twice");
        }
    }
    if which.is_empty() {
        return Ok(logits.clone());
    }
    apply(ReplaceColumns { which: which.to_vec() }, &[logits, &cols.to_dtype(logits.dtype())?])
}

fn index(ids: impl Iterator<Item = usize>, device: &Device) -> Result<Tensor> {
    let ids = ids
        .map(|i| u32::try_from(i).map_err(|_| candle_core::Error::Msg(format!("index {i} does not fit 32 bits"))))
        .collect::<Result<Vec<u32>>>()?;
    let n = ids.len();
    Tensor::from_vec(ids, n, device)
}

fn gather(table: &Tensor, ids: &[u32]) -> Result<Tensor> {
    table.contiguous()?.index_select(&Tensor::new(ids, table.device())?, 0)
}

struct Embedding(Vec<u32>);

impl DiffOp for Embedding {
    const NAME: &'static str = "embedding";
    const KEEPS: Keeps = Keeps::Nothing;

    fn cpu(&self, args: &[View<'_>]) -> Result<(Vec<f32>, Shape)> {
        let (table, (_, width)) = (args[0].data, args[0].rows()?);
        let out = new_rows(self.0.len() * width, width, width, |first, rows| {
            for (out, &id) in rows.chunks_exact_mut(width).zip(&self.0[first..]) {
                out.copy_from_slice(&table[id as usize * width..][..width]);
            }
        });
        Ok((out, Shape::from((self.0.len(), width))))
    }

    fn neutral(&self, args: &[Tensor]) -> Result<Tensor> {
        gather(&args[0], &self.0)
    }

    fn backward(&self, args: &[Tensor], _: &Tensor, grad: &Tensor, needs: &[bool]) -> Result<Vec<Option<Tensor>>> {
        let table = &args[0];
        if !needs[0] {
            return Ok(vec![None]);
        }
        let dtable = cpu::with(grad, |dy| {
            let (_, width) = dy.rows()?;
            let mut dtable = vec![0f32; table.elem_count()];
            if width > 0 {
                for (dy, &id) in dy.data.chunks_exact(width).zip(&self.0) {
                    let row = &mut dtable[id as usize * width..][..width];
                    row.iter_mut().zip(dy).for_each(|(s, &d)| *s += d);
                }
            }
            Ok(dtable)
        })?;
        Ok(vec![Some(cpu::tensor(dtable, table.shape())?)])
    }
}

struct ReplaceRows {
    /// For each token, the row that takes its place.
    source: Vec<Option<usize>>,
}

impl DiffOp for ReplaceRows {
    const NAME: &'static str = "replace_rows";
    const KEEPS: Keeps = Keeps::Nothing;

    fn cpu(&self, args: &[View<'_>]) -> Result<(Vec<f32>, Shape)> {
        let (base, rows) = (args[0], args[1].data);
        let (_, width) = base.rows()?;
        let mut out = base.data.to_vec();
        if width > 0 {
            for (out, row) in out.chunks_exact_mut(width).zip(&self.source) {
                if let Some(row) = row {
                    out.copy_from_slice(&rows[row * width..][..width]);
                }
            }
        }
        Ok((out, base.shape.clone()))
    }

    fn neutral(&self, args: &[Tensor]) -> Result<Tensor> {
        let tokens = self.source.len();
        let from = self.source.iter().enumerate().map(|(i, row)| row.map_or(i, |r| tokens + r));
        Tensor::cat(args, 0)?.index_select(&index(from, args[0].device())?, 0)
    }

    fn backward(&self, args: &[Tensor], _: &Tensor, grad: &Tensor, needs: &[bool]) -> Result<Vec<Option<Tensor>>> {
        let (k, width) = args[1].dims2()?;
        if is_cpu_f32(grad) {
            let (dbase, drows) = cpu::with(grad, |dy| {
                let mut dbase = if needs[0] { dy.data.to_vec() } else { Vec::new() };
                let mut drows = vec![0f32; k * width];
                for (token, row) in self.source.iter().enumerate().filter_map(|(t, r)| r.map(|r| (t, r))) {
                    let dy = &dy.data[token * width..][..width];
                    drows[row * width..][..width].iter_mut().zip(dy).for_each(|(s, &d)| *s += d);
                    if needs[0] {
                        dbase[token * width..][..width].fill(0.0);
                    }
                }
                Ok((dbase, drows))
            })?;
            let dbase = needs[0].then(|| cpu::tensor(dbase, grad.shape())).transpose()?;
            let drows = needs[1].then(|| cpu::tensor(drows, (k, width))).transpose()?;
            return Ok(vec![dbase, drows]);
        }
        let dbase = if needs[0] {
            let kept: Vec<f32> = self.source.iter().map(|r| if r.is_none() { 1.0 } else { 0.0 }).collect();
            let kept = Tensor::from_vec(kept, (self.source.len(), 1), grad.device())?.to_dtype(grad.dtype())?;
            Some(grad.broadcast_mul(&kept)?)
        } else {
            None
        };
        let drows = if needs[1] {
            let replaced = || self.source.iter().enumerate().filter_map(|(t, r)| r.map(|r| (t, r)));
            let dy = crate::reduce::wide(grad)?.index_select(&index(replaced().map(|p| p.0), grad.device())?, 0)?;
            let zeros = Tensor::zeros((k, width), dy.dtype(), grad.device())?;
            let sums = zeros.index_add(&index(replaced().map(|p| p.1), grad.device())?, &dy, 0)?;
            Some(sums.to_dtype(args[1].dtype())?)
        } else {
            None
        };
        Ok(vec![dbase, drows])
    }
}

struct ReplaceColumns {
    which: Vec<usize>,
}

impl DiffOp for ReplaceColumns {
    const NAME: &'static str = "replace_columns";
    const KEEPS: Keeps = Keeps::Nothing;

    fn cpu(&self, args: &[View<'_>]) -> Result<(Vec<f32>, Shape)> {
        let (logits, cols) = (args[0], args[1].data);
        let (_, vocab) = logits.rows()?;
        let mut out = logits.data.to_vec();
        for_row_blocks(&mut out, vocab, self.which.len(), |first, rows| {
            let cols = cols[first * self.which.len()..].chunks_exact(self.which.len());
            for (out, cols) in rows.chunks_exact_mut(vocab).zip(cols) {
                for (&at, &v) in self.which.iter().zip(cols) {
                    out[at] = v;
                }
            }
        });
        Ok((out, logits.shape.clone()))
    }

    fn neutral(&self, args: &[Tensor]) -> Result<Tensor> {
        let vocab = args[0].dims2()?.1;
        let mut from: Vec<usize> = (0..vocab).collect();
        for (j, &column) in self.which.iter().enumerate() {
            from[column] = vocab + j;
        }
        Tensor::cat(args, 1)?.contiguous()?.index_select(&index(from.into_iter(), args[0].device())?, 1)
    }

    fn backward(&self, args: &[Tensor], _: &Tensor, grad: &Tensor, needs: &[bool]) -> Result<Vec<Option<Tensor>>> {
        let device = grad.device();
        let dcols = if needs[1] {
            let columns = grad.index_select(&index(self.which.iter().copied(), device)?, 1)?;
            Some(columns.to_dtype(args[1].dtype())?)
        } else {
            None
        };
        let dlogits = if !needs[0] {
            None
        } else if is_cpu_f32(grad) {
            let zeros = Tensor::zeros(args[1].shape(), DType::F32, device)?;
            Some(apply(ReplaceColumns { which: self.which.clone() }, &[grad, &zeros])?)
        } else {
            let mut kept = vec![1f32; args[0].dims2()?.1];
            self.which.iter().for_each(|&column| kept[column] = 0.0);
            Some(grad.broadcast_mul(&Tensor::new(kept, device)?.to_dtype(grad.dtype())?)?)
        };
        Ok(vec![dlogits, dcols])
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use crate::philox::Stream;
    use crate::test_support::{Check, SHAPES};
    use crate::testing::{close, randn};

    /// Rows that the poisoned last element belongs to are always looked at.
    fn ids(tokens: usize, vocab: usize) -> Vec<u32> {
        let s = Stream { seed: 3, step: 0, site: 0 };
        (0..tokens).map(|i| if i == 0 { vocab as u32 - 1 } else { s.word(i as u64) % vocab as u32 }).collect()
    }

    #[test]
    fn embedding_looks_up_and_adds_back() {
        for (vocab, width) in SHAPES {
            for tokens in [1, 65, 257] {
                let ids = ids(tokens, vocab);
                let table = randn(1, (vocab, width), 1.0).unwrap();
                Check::new("embedding").sums_in_half().run(&[table], |a| embedding(&ids, &a[0])).unwrap();
            }
        }
    }

    #[test]
    fn embedding_names_the_bad_id() {
        let table = randn(1, (5, 2), 1.0).unwrap();
        let e = embedding(&[0, 4, 5], &table).unwrap_err().to_string();
        assert!(e.contains("id 5 at token 2") && e.contains("5 rows"), "{e}");
        assert_eq!(embedding(&[], &table).unwrap().dims(), [0, 2]);
        let half = table.to_dtype(DType::BF16).unwrap();
        assert_eq!(embedding(&[3], &half).unwrap().dtype(), DType::BF16);
    }

    #[test]
    fn replaced_rows() {
        for (tokens, width) in SHAPES {
            let base = randn(1, (tokens, width), 1.0).unwrap();
            let rows = randn(2, (2, width), 1.0).unwrap();
            // Every third token, of two rows in turn; the last row is shown, and so is the last token of the base.
            let which: Vec<_> = (0..tokens).step_by(3).map(|t| (t, (t / 3 + 1) % 2)).collect();
            if tokens % 3 != 1 {
                let args = [base.clone(), rows.clone()];
                Check::new("replace_rows").run(&args, |a| replace_rows(&a[0], &a[1], &which)).unwrap();
            }
            let y = replace_rows(&base, &rows, &which).unwrap().to_vec2::<f32>().unwrap();
            let (base, rows) = (base.to_vec2::<f32>().unwrap(), rows.to_vec2::<f32>().unwrap());
            for (t, y) in y.iter().enumerate() {
                assert_eq!(*y, which.iter().find(|w| w.0 == t).map_or(&base[t], |w| &rows[w.1]).clone());
            }
        }
    }

    #[test]
    fn replaced_columns() {
        for (n, vocab) in [(1, 2), (3, 7), (65, 33), (257, 33), (3, 577)] {
            let args = [randn(1, (n, vocab), 1.0).unwrap(), randn(2, (n, 2), 1.0).unwrap()];
            let which = [vocab - 2, 0];
            let which = if vocab == 2 { &which[..1] } else { &which[..] };
            let args = [args[0].clone(), args[1].narrow(1, 0, which.len()).unwrap().contiguous().unwrap()];
            Check::new("replace_columns").run(&args, |a| replace_columns(&a[0], &a[1], which)).unwrap();
            let y = replace_columns(&args[0], &args[1], which).unwrap();
            for (j, &column) in which.iter().enumerate() {
                let got = y.narrow(1, column, 1).unwrap();
                close("column", &got, &args[1].narrow(1, j, 1).unwrap(), 0.0).unwrap();
            }
        }
    }

    #[test]
    fn indices_out_of_range_or_twice() {
        let (base, rows) = (randn(1, (3, 4), 1.0).unwrap(), randn(2, (2, 4), 1.0).unwrap());
        for (which, say) in
            [(&[(3, 0)][..], "token 3"), (&[(0, 2)], "row 2"), (&[(1, 0), (1, 1)], "token 1 is replaced twice")]
        {
            let e = replace_rows(&base, &rows, which).unwrap_err().to_string();
            assert!(e.contains(say), "{e}");
        }
        let cols = randn(2, (3, 2), 1.0).unwrap();
        for (which, say) in [(&[0, 4][..], "column 4"), (&[1, 1], "twice"), (&[1], "[3, 2]")] {
            let e = replace_columns(&base, &cols, which).unwrap_err().to_string();
            assert!(e.contains(say), "{e}");
        }
        assert_eq!(replace_rows(&base, &rows, &[]).unwrap().id(), base.id());
    }
}
