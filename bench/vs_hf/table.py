"""The table: each ratio's median and spread over the rounds, beside the goal."""
import statistics


def figure(key, value):
    if key == "peak_bytes":
        return f"{value / 1e6:,.0f} MB"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def holds(goal, value):
    relation, bound = goal.split()
    return value >= float(bound) if relation == "≥" else value <= float(bound)


def line(model, ratio, rounds):
    """A row of Markdown, from `rounds` of {side: measurement}."""
    refused = next((sides[ratio.side]["refused"] for sides in rounds if "refused" in sides[ratio.side]), None)
    if refused:
        return f"| {ratio.what} | {model.name} | refused: {refused} | | | {ratio.goal and ratio.goal + ', missed'} |"
    ours = [sides[ratio.side] for sides in rounds]
    below = [sides["hf"][ratio.key] for sides in rounds] if ratio.over == "hf" else [side[ratio.over] for side in ours]
    ratios = [side[ratio.key] / other for side, other in zip(ours, below, strict=True)]
    middle = statistics.median(ratios)
    spread = f" ({min(ratios):.2f}–{max(ratios):.2f})" if len(ratios) > 1 else ""
    goal = f"{ratio.goal}{'' if holds(ratio.goal, middle) else ', missed'}" if ratio.goal else ""
    cells = [
        ratio.what,
        model.name,
        figure(ratio.key, statistics.median(side[ratio.key] for side in ours)),
        figure(ratio.key, statistics.median(below)) if ratio.over == "hf" else f"(model {figure(ratio.key, below[0])})",
        f"**{middle:.2f}**{spread}",
        goal,
    ]
    return "| " + " | ".join(cells) + " |"


HEAD = "| | model | ours | HF PEFT | ours / HF: median (min–max) | goal |\n|---|---|---|---|---|---|"


def table(results):
    """Markdown of `results`, a list of (model, case, rounds)."""
    lines = [line(model, ratio, rounds) for model, case, rounds in results for ratio in case.ratios]
    return "\n".join([HEAD, *lines])
