"""The studies of the README: each one command, with a CSV file and a picture in figures/.

    python figures/study.py ablations    the context loss with one part changed
    python figures/study.py alpha        or characters, number_share, steps, width: a sweep of it
    python figures/study.py tuning       against the start of tau, on the validation tasks
    python figures/study.py post         a finished base, continued without and with context
    python figures/study.py frontier     zero-shot against 16-shot in training; minutes.png: time
    python figures/study.py emergence    losses, temperatures, attention, accuracy in training
    python figures/study.py attention    which cards an image attends to; where gradients flow
    python figures/study.py cards        training cards with their captions
    python figures/study.py real         images of --data DIR [DIR ...], and with plates
    python figures/study.py profile      where the time of a training step goes
    python figures/study.py memory       memory and time of the loss against B, and in blocks

Models are kept in runs/study: what is trained is not trained again, an interrupted study goes on.
Sweeps and ablations report fewshot.py's 21 tasks (of few characters fewer), the mean of its six
classifiers, with two draws of images per training seed; zero-shot those of known words.
"""

import argparse
import csv
import os
import sys
import textwrap
import time
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import contextclip as cc  # noqa: E402
import fewshot as fs  # noqa: E402

FIGURES, RUNS = Path(__file__).resolve().parent, Path("runs/study")
DEFAULT = cc.Settings("clixp")
OBJECTIVES = {"base": "clip", "context": "clixp"}
SHOTS = {"zero-shot": 0, "1-shot": 1, "4-shot": 4, "16-shot": 16}
COLORS = ["#D55E00", "#0072B2", "#009E73", "#555555"]


def print_rows(rows, path=None):
    """Print dictionaries of the same keys as a table in Markdown, numbers to one decimal."""
    for row in (rows[0].keys(), ["---"] * len(rows[0]), *(row.values() for row in rows)):
        cells = [cell if isinstance(cell, str) else f"{cell:.1f}" for cell in row]
        print(f"| {' | '.join(cells)} |")


def read_rows(path):
    """The rows of a CSV file, each {column: text}."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def write_rows(path, rows):
    """Write dictionaries of the same keys to a CSV file."""
    cc.write_csv(path, [rows[0].keys(), *(row.values() for row in rows)])


def draw_panels(panels, path):
    """Write a picture, side by side {(name of x, of y): [(label, x, y, error, line, color)]}."""
    figure = Figure((4.3 * len(panels), 3.8), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, ((across, up), lines) in zip(axes, panels.items(), strict=True):
        for label, x, y, error, line, color in lines:
            axis.errorbar(x, y, error, fmt=line, color=color, label=label, markersize=4, capsize=2)
        axis.set(xlabel=across, ylabel=up)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=6)
    fs.save_figure(figure, path)


# ---- Training ------------------------------------------------------------------------------------
@torch.no_grad()
def attend(model, cards, tau_ctx):
    """Of a batch, always the same: images, attention (B, B), which pairs of cards share their
    character, and which others two digits or more."""
    torch.manual_seed(1)
    i = torch.arange(DEFAULT.batch_size, device=cards.device)
    chosen = cards.train[torch.randint_like(i, len(cards.train))]
    images, numbers = cc.draw_cards(cards, chosen, "train")
    x = model.encode_image(images, normalize=True)
    same, others = chosen[:, None] == chosen, i[:, None] != i
    digits = ((numbers[:, None] == numbers).sum(-1) >= 2) & ~same
    return images, cc.attention(x, i, x, tau_ctx), same & others, digits


def share(weights, kind):
    """Percent of the attention that falls on a `kind` (B, B), of the rows that have any."""
    return 100 * (weights * kind).sum(1)[kind.any(1)].mean().item()


def train(seed, folder="", init=None, **changes):
    """Train a model with changes of the default, if it is not there: its checkpoint, its cards.
    Beside it lies a CSV file of its attention and validation accuracies over training."""
    settings = replace(DEFAULT, seed=seed, **changes)
    usual = replace(DEFAULT, objective=settings.objective)
    changed = [f"{name}={v}" for name, v in changes.items() if v != getattr(usual, name)]
    path = RUNS / folder / ("-".join(changed) or "default") / f"seed{seed}"
    path = path / f"{settings.objective}.pt"
    cards, history = cc.Cards(cc.choose_device(), settings), path.with_suffix(".watched.csv")
    rows = {row["step"]: row for row in (read_rows(history) if history.exists() else [])}

    def watch(step, model):
        if step % 200 == 0 or step in (10, 50, 100):
            _, weights, same, _ = attend(model, cards, model.temperatures()[2])
            found = {"step": step, "attention": share(weights, same)} | cards.validate(model)
            rows[str(step)] = found  # a resumed run goes through some steps again
            write_rows(history, list(rows.values()))

    with cc.make_writable(path.parent):
        cc.train(settings, cards, path.parent, resume=True, init=init, watch=watch)
    return path, cards


# ---- Ablations and sweeps ------------------------------------------------------------------------
ABLATIONS = {  # name: changed settings
    "base": {"objective": "clip"}, "no self-mask": {"no_mask": True}, "alpha 0.6": {"alpha": 0.6},
    "alpha 0.97": {"alpha": 0.97}, "shared temperature": {"shared_temperature": True},
    "detached values": {"detach_values": True}, "normalised values": {"normalize_values": True},
}  # fmt: skip
PAPER = {"no self-mask": " (paper: 50.9, 60.5)", "alpha 0.6": " (paper: 48.7, 61.5)"}
PAPER |= {"shared temperature": " (paper: 47.8, 61.8)", "detached values": " (paper: 43.8, 58.7)"}
PAPER |= {"base": " (paper's full method: zero-shot 50.5, 16-shot 64.1)"}


def sweep(name, values, **others):
    """{value: {model: changed settings}}, base and context for each value of a setting."""
    found = {}
    for value in values:
        changes = {name: value} | others
        base = {} if name == "alpha" else changes  # the plain loss knows no alpha
        found[str(value)] = {"base": base | {"objective": "clip"}, "context": changes}
    return found


SWEEPS = {  # what is compared: two models that see the same images
    "ablations": {name: {"full": {}, "changed": changes} for name, changes in ABLATIONS.items()},
    "alpha": sweep("alpha", [0.6, 0.8, 0.9, 0.97]),
    "characters": sweep("characters", [60, 125, 250, 0]),
    "number_share": sweep("number_share", [0.0, 0.25, 0.5, 0.75, 0.9, 1.0]),
    "steps": sweep("steps", [400, 800, 1600, 3200, 6400]),
    "width": sweep("width", [32, 64, 128]),
    "tuning": sweep("tau", [3.0, 5.0, 8.0, 14.3]),
    "post": sweep("steps", [25, 100, 400], lr=5e-4),
}


def evaluate(models, cards, seed):
    """{(model, task, shots): accuracies} on the 21 tasks."""
    tasks, validation = fs.card_tasks(cards), fs.validation_tasks(cards)
    methods, draws, found = ["zero-shot", *fs.SIX], (2 * seed, 2 * seed + 1), {}
    rows, _ = fs.evaluate(models, tasks, validation, methods, [1, 4, 16], draws, queries=16)
    for model, task, _, _, k, _, accuracy in rows:
        found.setdefault((model, task, k), []).append(accuracy)
    return found


def measure_sweep(study, args):
    """Train and evaluate the models: rows of mean accuracies, a task each."""
    for (of, changes), seed in product(SWEEPS[study].items(), range(args.seeds)):
        more, models, found = {}, {}, {}
        if study == "post":
            base, _ = train(seed, objective="clip")
            more = {"folder": "post", "init": cc.read_checkpoint(base)}
        for model, change in changes.items():
            path, cards = train(seed, **more, **change)
            models[model] = cc.load(path, cards.device)
            result = cc.read_checkpoint(path)["result"]
            found |= {(model, "all", k): result.get(name) for name, k in SHOTS.items()}
        if study != "tuning":
            found = evaluate(models, cards, seed)
        for (model, task, k), values in found.items():
            row = {"of": of, "model": model, "seed": seed, "task": task, "shots": k}
            yield row | {"accuracy": round(np.mean(values), 3)}


def show_sweep(rows, path):
    """Print and draw accuracies of both models and their difference, for each value."""
    cells, names = {}, list(dict.fromkeys(row["model"] for row in rows))
    for row in rows:
        tasks = cells.setdefault(row["of"], {}).setdefault((row["shots"], row["model"]), {})
        tasks.setdefault(row["task"], []).append(float(row["accuracy"]))
    lines = [{path.stem: of + PAPER.get(of, "")} for of in cells]
    left, right = [], []
    for (shots, k), color in zip(SHOTS.items(), COLORS, strict=True):
        found = []
        for line, table in zip(lines, cells.values(), strict=True):
            first, second = (np.array(list(table[str(k), name].values())) for name in names)
            mean, width = fs.interval(second - first)
            found.append((first.mean(), second.mean(), mean, width))
            gain = f"{mean:+.1f} ± {width:.1f}".removesuffix(" ± nan")
            line[f"{shots}: {', '.join(names)}"] = f"{found[-1][0]:.1f}, {found[-1][1]:.1f}, {gain}"
        first, second, *gains = np.nan_to_num(found).T
        x = [of.replace(" ", "\n") for of in cells]
        left.append((f"{shots}, {names[0]}", x, first, None, "o--", color))
        left.append((f"{shots}, {names[1]}", x, second, None, "s-", color))
        right.append((shots, x, *gains, "s-", color))
    print_rows(lines)
    draw_panels({(path.stem, "%"): left, (path.stem, " - ".join(names[::-1])): right}, path)


# ---- During training -----------------------------------------------------------------------------
TAUS = {"3.0": ":", "5.0": "-"}
PANELS = {
    "loss in nats": ["plain_loss", "context_loss"],
    "temperature / that at the first point": ["tau_1", "tau_2", "tau_ctx sqrt(d)"],
    "attention on the same character, %": ["attention"],
    "validation accuracy, %": list(SHOTS),
}


def measure_history(taus, args):
    """Train from these starts of tau: rows of watched steps, seconds their share of the whole."""
    for tau, (model, objective), seed in product(taus, OBJECTIVES.items(), range(args.seeds)):
        path, _ = train(seed, objective=objective, tau=float(tau))
        content = cc.read_checkpoint(path)
        log = {line[0]: dict(zip(cc.COLUMNS, line, strict=True)) for line in content["log"]}
        for row in read_rows(path.with_suffix(".watched.csv")):
            row = {"model": model, "tau": tau, "seed": seed} | log[int(row["step"])] | row
            row["tau_ctx sqrt(d)"] = row["tau_ctx"] * DEFAULT.width**0.5
            yield row | {"seconds": content["seconds"] * int(row["step"]) / DEFAULT.steps}


def curves(rows, columns, model, tau=str(DEFAULT.tau)):
    """Means over seeds (columns, steps) of a model."""
    steps = {}
    for row in rows:
        if row["model"] == model and row["tau"] == tau:
            steps.setdefault(row["step"], []).append([float(row[column]) for column in columns])
    return np.mean(list(steps.values()), axis=1).T


def show_frontier(rows, path):
    """Print the best 16-shot points and the ends; draw the ways there, and accuracy by seconds."""
    lines, paths = [], []
    minutes = {("seconds of training", f"{name}, %"): [] for name in ("zero-shot", "16-shot")}
    for (tau, style), (i, model) in product(TAUS.items(), enumerate(OBJECTIVES)):
        seconds, *points = curves(rows, ["seconds", "step", "zero-shot", "16-shot"], model, tau)
        for name, place in (("best 16-shot", points[2].argmax()), ("end", -1)):
            step, *accuracies = (values[place] for values in points)
            line = {"start of tau": tau, "model": model, "point": name, "step": f"{step:.0f}"}
            lines.append(line | {"zero-shot": accuracies[0], "16-shot": accuracies[1]})
        paths.append((f"{model}, tau from {tau}", *points[1:], None, style, COLORS[i]))
        paths.append((None, *accuracies, None, "o", COLORS[i]))
        if tau == str(DEFAULT.tau):
            for panel, values in zip(minutes.values(), points[1:], strict=True):
                panel.append((model, seconds, values, None, "-", COLORS[i]))
    print_rows(lines)
    draw_panels({("zero-shot, %", "16-shot, %"): paths}, path)
    draw_panels(minutes, path.with_name("minutes.png"))


def show_emergence(rows, path):
    """Print the ends and draw four panels over training steps."""
    panels, ends = {}, {model: {"end": model} for model in OBJECTIVES}
    for title, columns in PANELS.items():
        panels["step", title] = lines = []
        for (i, column), model in product(enumerate(columns), OBJECTIVES):
            steps, values = curves(rows, ["step", column], model)
            ends[model][column] = f"{values[-1]:.2f}"
            line = "-" if model == "context" else "--"
            if "temperature" in title:
                values = values / values[0]
            if np.ptp(values) > 1e-6:  # the base has no context loss, nor trains its temperatures
                lines.append((f"{column}, {model}", steps, values, None, line, COLORS[i]))
    print_rows(list(ends.values()))
    draw_panels(panels, path)


# ---- Pictures ------------------------------------------------------------------------------------
def draw_grid(cells, size, path):
    """Write a picture of rows of cells (image (1, S, S), title, color of a frame)."""
    figure = Figure((size[0] * len(cells[0]), size[1] * len(cells)), layout="constrained")
    axes = figure.subplots(len(cells), len(cells[0]), squeeze=False).flat
    for axis, (image, title, color) in zip(axes, sum(cells, []), strict=True):
        axis.imshow(image[0].numpy(force=True), cmap="gray", vmin=0, vmax=1)
        axis.set_title(title, fontsize=8)
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set(color=color, linewidth=3)
    fs.save_figure(figure, path)


def split_gradient(model, cards):
    """Of the context loss's gradient to raw images' embeddings, the parts through the values and
    through queries and keys: squared norms in percent of the sum's, and the cosine between them."""
    torch.manual_seed(1)
    images, tokens = cards.draw_batch(DEFAULT, 0)
    t, v = model.encode_text(tokens, normalize=True), model.encode_image(images)
    values, others = v.clone().requires_grad_(), v.clone().requires_grad_()
    x, i = F.normalize(others, dim=1), torch.arange(len(t), device=t.device)
    _, tau_2, tau_ctx, *_ = model.temperatures()
    x_ctx = F.normalize(cc.contextualize(x, i, x, values, tau_ctx), dim=1)
    loss = cc.clip_loss(x_ctx, t, i, x_ctx, t, tau_2).mean()
    first, second = (g.flatten() for g in torch.autograd.grad(loss, (values, others)))
    shares = [(100 * g @ g / (first + second).square().sum()).item() for g in (first, second)]
    cosine = f"{F.cosine_similarity(first, second, dim=0):.2f}"
    return {"through values, %": shares[0], "queries and keys, %": shares[1], "cosine": cosine}


def draw_attention(args, path):
    """Cards and the six that each attends to most, by base and context at the latter's tau_ctx:
    green the same character, orange two digits in common; print shares and gradients."""
    found = {name: train(0, objective=objective) for name, objective in OBJECTIVES.items()}
    models = {name: cc.load(path, cards.device) for name, (path, cards) in found.items()}
    cards, rows = found["base"][1], []
    tau_1, tau_2, tau_ctx, *_ = models["context"].temperatures().tolist()
    cells = [[] for _ in range(5)]
    for name, model in models.items():
        images, weights, same, digits = attend(model, cards, tau_ctx)
        for kind, there in (("the same character", same), ("two digits in common", digits)):
            rows.append({"model": name, "attention to": kind, "%": share(weights, there)})
        for row, query in zip(cells, same.any(1).nonzero()[:, 0].tolist(), strict=False):
            row.append((images[query], name, "black"))
            for i in weights[query].topk(6).indices.tolist():
                color = COLORS[2] if same[query, i] else "#E69F00" if digits[query, i] else "white"
                row.append((images[i], f"{100 * weights[query, i]:.1f} %", color))
    print_rows(rows)
    print_rows([split_gradient(models["context"], cards) | {"tau_1": tau_1, "tau_2": tau_2}])
    draw_grid(cells, (1, 1.2), path)


def draw_cards(args, path):
    """18 training cards with their captions."""
    cards, cells = cc.Cards(cc.choose_device(), DEFAULT), []
    torch.manual_seed(0)
    images, tokens = cards.draw_batch(replace(DEFAULT, batch_size=18), 0)
    words = list(cards.vocabulary)
    for image, row in zip(images, tokens.tolist(), strict=True):
        text = " ".join(words[token] for token in row if token).replace(" number", ", number")
        cells.append((image, textwrap.fill(text, 25), "white"))
    draw_grid([cells[:6], cells[6:12], cells[12:]], (1.9, 2.3), path)


def draw_real(args, path):
    """Images of your own, a row per set: as they are, and with plates."""
    cards, fit, cells = cc.Cards("cpu", DEFAULT), cc.preprocess(DEFAULT), []
    for source in args.data or []:
        dataset = fs.open_dataset(source, Path("runs/data"))
        with cc.blame(f"--data {source}"):
            places = np.linspace(0, len(dataset) - 1, 6).astype(int).tolist()
            images = torch.stack([fit(dataset[i][0]) for i in places])
        torch.manual_seed(0)
        images = [*images, *fs.with_plates(images, cards)]
        cells.append([(image, Path(source).name, "white") for image in images])
    if not cells:
        raise cc.UserError("real: it needs --data, folders of a folder per class")
    draw_grid(cells, (1, 1.2), path)


# ---- Time and memory -----------------------------------------------------------------------------
def by_turns(parts, rounds):
    """{name: median seconds} of functions called by turns, for machines drift, once to warm up."""
    found = {name: [] for name in parts}
    for _, (name, part) in product(range(rounds + 1), parts.items()):
        start = time.perf_counter()
        part()
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        found[name].append(time.perf_counter() - start)
    return {name: np.median(seconds[1:]) for name, seconds in found.items()}


def make_loss(settings):
    """A function that computes the loss of random embeddings, and its gradient."""
    model = cc.ContextCLIP(settings, ["a"]).to(cc.choose_device())
    like = torch.empty(settings.batch_size, settings.width, device=model.b.device)
    v, t = (torch.randn_like(like, requires_grad=True) for _ in range(2))
    return lambda: cc.lixp_loss(v, t, model, settings)[0].backward()


def measure_profile(args):
    """A row per part of a training step; encoders and loss are forward and backward."""
    cards = cc.Cards(cc.choose_device(), DEFAULT)
    batches = iter(partial(cards.draw_batch, DEFAULT, 0), None)
    model, _, optimizer = cc.start(DEFAULT, cards, None, None, False)
    images, tokens = next(batches)
    parts = {
        "before optimizer": lambda: model(*next(batches))[0].backward(),
        "optimizer": optimizer.step,
        "image encoder": lambda: model.encode_image(images).sum().backward(),
        "text encoder": lambda: model.encode_text(tokens).sum().backward(),
        "cards": lambda: next(batches),
        "loss": make_loss(DEFAULT),
    }
    seconds = by_turns(parts, 20)
    seconds["both encoders"] = seconds["image encoder"] + seconds["text encoder"]
    seconds["full step"] = whole = seconds["before optimizer"] + seconds["optimizer"]
    for name, median in seconds.items():
        yield {"part": name, "ms": f"{1000 * median:.1f}", "%": f"{100 * median / whole:.0f}"}


def measure_loss(settings):
    """MiB that the loss and its gradient add to the GPU's or this process's peak, and seconds."""

    def peak():  # not getrusage's, which begins with the peak of the process that started this one
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated() / 2**20
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 2**10

    make_loss(replace(settings, batch_size=64))()
    loss, before = make_loss(settings), peak()
    seconds = by_turns({"loss": loss}, 3)["loss"]
    return {"MiB": f"{peak() - before:.0f}", "seconds": f"{seconds:.3f}"}


def measure_memory(args):
    """Rows by batch and blocks, each of a process where glibc's malloc returns what is freed."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    for B, chunk in product((1024, 2048, 4096, 8192), (0, 512)):
        with torch.multiprocessing.get_context("spawn").Pool(1) as pool:
            found = pool.apply(measure_loss, [replace(DEFAULT, batch_size=B, chunk=chunk)])
        yield {"B": str(B), "chunk": str(chunk)} | found


# ---- The command line ----------------------------------------------------------------------------
PICTURES = {"attention": draw_attention, "cards": draw_cards, "real": draw_real}
STUDIES = {study: (partial(measure_sweep, study), show_sweep) for study in SWEEPS}
STUDIES["frontier"] = (partial(measure_history, TAUS), show_frontier)
STUDIES["emergence"] = (partial(measure_history, [str(DEFAULT.tau)]), show_emergence)
STUDIES["profile"] = (measure_profile, print_rows)
STUDIES["memory"] = (measure_memory, print_rows)


@cc.errors_in_one_line("study")
def main(arguments=None):
    """Measure, draw and print one study."""
    parser = argparse.ArgumentParser("study", argparse.SUPPRESS, __doc__.splitlines()[0])
    parser.add_argument("study", choices=[*STUDIES, *PICTURES])
    parser.add_argument("--seeds", type=int, default=3, choices=range(1, 11), metavar="N")
    parser.add_argument("--draw", action="store_true", help="only draw, from the CSV file")
    parser.add_argument("--data", nargs="+", help="of real: folders of images")
    args = parser.parse_args(arguments)
    path = FIGURES / f"{args.study}.png"
    if args.study in PICTURES:
        return PICTURES[args.study](args, path)
    measure, show = STUDIES[args.study]
    if not args.draw:
        write_rows(path.with_suffix(".csv"), list(measure(args)))
    show(read_rows(path.with_suffix(".csv")), path)


if __name__ == "__main__":
    main()
