"""Training in torch on the rows that peft-cli trains on, and how far the two may be apart."""
import cases
import torch
from check import Short


def steps(model, rows, count, batch_rows, learning_rate, trained=None, alone=False, penalty=None):
    """Losses of `count` steps of AdamW, of all parameters that ask for a gradient or of `trained`. With `alone` no row is padded, for
    where padding changes what is computed. `penalty` gives what is minimised with the loss."""
    # Some parameters may get no gradient: an intervention that no position has.
    trained = trained or [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
    for step in range(count):
        batch = rows[step * batch_rows : (step + 1) * batch_rows]
        sums = [cases.summed_loss(model, part) for part in ([[row] for row in batch] if alone else [batch])]
        loss, tokens = sum(loss for loss, _ in sums), sum(tokens for _, tokens in sums)
        (loss / tokens + (penalty() if penalty else 0)).backward()
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item() / tokens


def same_weights(start, ours, theirs):
    """That training moved the tensors at `start` here to where it moved them there, within 2 % of the way (L2)."""
    norm = lambda tensors: sum(value.double().pow(2).sum().item() for value in tensors) ** 0.5
    if start.keys() != ours.keys():
        raise Short(f"tensors {sorted(start.keys() ^ ours.keys())} are not in both files")
    moved = norm(theirs[key] - value for key, value in start.items())
    apart = norm(theirs[key] - value for key, value in ours.items())
    if not apart <= 0.02 * moved:
        raise Short(f"training moved the parameters by {moved:.4f} there, and ours are {apart:.4f} apart from them")
