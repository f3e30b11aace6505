//! The task that a row is of, for adapters that do another thing for each (Poly, multitask prompt tuning).

use serde_json::Value;

use super::error::DataError;
use super::source::Row;

/// The columns that may name it. PEFT's `forward` calls it `task_ids`.
const COLUMNS: [&str; 2] = ["task_id", "task_ids"];

/// The row's task, one of `tasks`: a number from 0, in any format of rows. With a single task the column may be missing.
pub(super) fn task_of(row: &Row, tasks: usize) -> Result<u32, DataError> {
    let mut given = COLUMNS.into_iter().filter_map(|name| Some((name, row.fields.get(name).filter(|v| !v.is_null())?)));
    let Some((name, value)) = given.next() else {
        if tasks == 1 {
            return Ok(0);
        }
        let message = format!(
            "names no task, and the adapter has {tasks}: give it a column `task_id` with a number from 0 to {}",
            tasks.saturating_sub(1)
        );
        return Err(DataError::row(&row.at, message));
    };
    if given.next().is_some() {
        return Err(DataError::row(&row.at, "has both columns `task_id` and `task_ids`; leave one out"));
    }
    let task = match value {
        Value::Number(n) => n.as_u64(),
        // CSV has texts alone.
        Value::String(text) => text.trim().parse().ok(),
        Value::Array(one) => match one.as_slice() {
            [one] => one.as_u64(),
            _ => None,
        },
        _ => None,
    };
    let task = task.and_then(|task| u32::try_from(task).ok()).filter(|task| (*task as usize) < tasks);
    task.ok_or_else(|| {
        let message =
            format!("{name} is {value}, which is not one of the adapter's tasks, 0 to {}", tasks.saturating_sub(1));
        DataError::row(&row.at, message)
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::path::Path;

    use serde_json::json;

    use super::super::error::Location;
    use super::*;

    #[test]
    fn a_task_is_a_number_of_either_column() {
        let of = |fields: Value, tasks| {
            let at = Location::line(&Path::new("rows.jsonl").into(), 7);
            task_of(&Row { fields: fields.as_object().unwrap().clone(), at }, tasks)
        };
        assert_eq!(of(json!({"task_id": 2}), 3).unwrap(), 2);
        assert_eq!(of(json!({"task_ids": [1]}), 3).unwrap(), 1);
        assert_eq!(of(json!({"task_id": " 1"}), 2).unwrap(), 1);
        assert_eq!(of(json!({"task_id": null}), 1).unwrap(), 0);
        for (fields, says) in [
            (json!({"text": "a"}), "`task_id` with a number from 0 to 2"),
            (json!({"task_id": 3}), "task_id is 3"),
            (json!({"task_id": -1}), "task_id is -1"),
            (json!({"task_id": 1.5}), "1.5"),
            (json!({"task_ids": [0, 1]}), "task_ids is [0,1]"),
            (json!({"task_id": "HumanEval/0"}), "HumanEval/0"),
            (json!({"task_id": 4_294_967_296_u64}), "0 to 2"),
            (json!({"task_id": 1, "task_ids": 1}), "both"),
        ] {
            let e = of(fields, 3).unwrap_err().to_string();
            assert!(e.contains(says) && e.contains("rows.jsonl") && e.contains('7'), "{e}");
        }
    }
}
