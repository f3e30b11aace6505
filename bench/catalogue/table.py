"""The table of one model."""

HEAD = "| method | accuracy | PEFT's | trained parameters | share | training, processor-seconds (PEFT's) | peak memory (PEFT's) | file | decode |"


def size(value):
    return f"{value / 1e6:.1f} MB" if value >= 1e6 else f"{value / 1e3:.1f} kB"


def line(name, sides):
    ours, hf = sides["ours"], sides.get("hf")
    beside = lambda key, show: show(ours[key]) + (f" ({show(hf[key])})" if hf else "")
    overhead = ours.get("decode_overhead")
    cells = [
        name,
        f"{ours['accuracy']:.1%}",
        f"{hf['accuracy']:.1%}" if hf else "",
        f"{ours['trainable_parameters']:,}",
        f"{ours['share']:.3%}",
        beside("cpu_seconds", lambda seconds: f"{seconds:.0f}"),
        beside("peak_bytes", lambda value: f"{value / 1e6:,.0f} MB"),
        size(ours["file_bytes"]),
        "" if overhead is None else f"{overhead:+.0%}",
    ]
    return "| " + " | ".join(cells) + " |"


def table(before, results):
    """Markdown; `before` is the accuracy of the untrained base, or None where its head is new. Best first."""
    best = sorted(results, key=lambda result: -result[1]["ours"]["accuracy"])
    first = [] if before is None else [f"| (the base alone) | {before:.1%} | | 0 | | | | | |"]
    return "\n".join([HEAD, "|---" * 9 + "|", *first, *(line(name, sides) for name, sides in best)])
