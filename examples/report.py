"""What the run ends with: a table in the terminal and a picture."""

import matplotlib

matplotlib.use("Agg")  # a file is written; no display is needed
import matplotlib.pyplot as plt


def table(rows):
    """`rows`: (what, test accuracy, trainable parameters, seconds, bytes); None shows as a dash."""
    header = ("", "test accuracy", "trainable parameters", "seconds", "file bytes")
    formats = (str, "{:.1%}".format, "{:,}".format, "{:.0f}".format, "{:,}".format)
    cells = [header]
    for row in rows:
        cells.append(tuple("-" if cell is None else form(cell) for form, cell in zip(formats, row, strict=True)))
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = []
    for row in cells:
        padded = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *padded[1:]]))
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)


def plot(path, history, title):
    """Loss and validation accuracy over the epochs; epoch 0 is the frozen encoder with its best head."""
    per_epoch = history.steps[1]
    epochs = [step / per_epoch for step in history.steps]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    figure.suptitle(title)

    positions = [(step + 1) / per_epoch for step in range(len(history.losses))]
    left.plot(positions, history.losses, color="tab:blue", alpha=0.2, linewidth=1)
    left.plot(positions, running_mean(history.losses), color="tab:blue", label="training (running mean)")
    left.plot(epochs, history.validation_losses, "o-", color="tab:orange", label="validation")
    left.set(xlabel="epoch", ylabel="cross-entropy loss", title="Loss")
    # single batches vary widely: the axis follows the two lines that are read
    left.set_ylim(0, 1.25 * max(running_mean(history.losses) + history.validation_losses))

    percent = [100 * value for value in history.validation_accuracies]
    right.plot(epochs, percent, "o-", color="tab:orange", label="after each epoch")
    right.axhline(percent[0], color="gray", linestyle="--", label="frozen encoder, best head")
    for at, value in zip(epochs, percent, strict=True):
        right.annotate(f"{value:.1f}", (at, value), textcoords="offset points", xytext=(0, 7), ha="center", fontsize=9)
    right.set(xlabel="epoch", ylabel="validation accuracy (%)", title="Accuracy")
    right.margins(y=0.2)
    for axis in (left, right):
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        axis.legend()
    left.legend(loc="upper right")
    right.legend(loc="lower right")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def running_mean(values, decay=0.95):
    means, mean, weight = [], 0.0, 0.0
    for value in values:
        mean, weight = decay * mean + (1 - decay) * value, decay * weight + 1 - decay
        means.append(mean / weight)  # divided by the weights so far: the start is not pulled to zero
    return means
