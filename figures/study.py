"""The studies of README.md and figures/README.md, one command each. It trains what is missing in
runs/study, writes figures/NAME.csv, prints a table and draws figures/NAME.png; with --draw it only
prints and draws again. Minutes are for three seeds, two studies at a time on two cores.

python figures/study.py cards         training cards with their captions (a second)
python figures/study.py attention     the cards an image attends to, in both models (5 minutes)
python figures/study.py sizes         accuracy by size and by length, free and capped (200)
python figures/study.py tau_max       accuracy by the cap of tau_1 and tau_2 (80)
python figures/study.py nearness      what is near what in the models of `sizes` (3; a table)
python figures/study.py number_share  accuracy by the share of captions that name the number (60)
python figures/study.py training      temperature and accuracy during training (15)
python figures/study.py ablations     the context loss with one part changed (80)
python figures/study.py post          a finished baseline, continued (30; a table)
python figures/study.py replay        each model with the tau_1 of the other (30; a table)
"""

import argparse
import csv
import math
import sys
import textwrap
from dataclasses import asdict, replace
from functools import cache
from itertools import product
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

FIGURES = Path(__file__).resolve().parent
sys.path.insert(0, str(FIGURES.parent))
import contextclip as cc  # noqa: E402
import fewshot as fs  # noqa: E402

DEFAULT = cc.Settings()
DEFAULTS = asdict(DEFAULT)
B = DEFAULT.batch_size
KINDS = [("baseline", "#0072B2"), ("context model", "#D55E00")]
GREEN = "#009E73"


# ---- Training and evaluation ---------------------------------------------------------------------
@cache
def get_cards():
    """The cards that all models see."""
    return cc.Cards(cc.choose_device(cpu=False))


def train(seed, tau_of="", post=False, **changes):
    """Train a model with changes of the default settings, if it is not there -> its checkpoint.
    tau_of: an objective, whose tau_1 it has, step by step; post: it starts from the baseline."""
    if post:
        base = train(seed, objective=changes["objective"].replace("xp", "ip"))
        changes |= {"init": str(base), "lr": 5e-4}
    settings = replace(DEFAULT, seed=seed, **changes)
    changed = {k: v for k, v in changes.items() if v != DEFAULTS[k] and k != "objective"}
    name = [f"{key}={value}" for key, value in changed.items()]
    clamp = cc.LIxPLoss.clamp
    if tau_of not in ("", settings.objective):
        clamp = replay_tau(settings, train(seed, **changes | {"objective": tau_of}))
        name.append(f"tau_of={tau_of}")
    name = "-".join(name).replace("/", ".") or "default"
    folder = Path("runs/study", name, f"seed{seed}")
    folder.mkdir(parents=True, exist_ok=True)
    with mock.patch.object(cc.LIxPLoss, "clamp", clamp):
        cc.train(settings, get_cards(), folder)
    return folder / f"{settings.objective}.pt"


def replay_tau(settings, path):
    """`LIxPLoss.clamp`, called after each step, that puts tau_1 where the log of another model has
    it. A run with it cannot be resumed."""
    log = read_rows(path.with_suffix(".csv"))
    start = cc.LIxPLoss(settings).scalars()["tau_1"].item()
    steps = [0.0, *(float(row["step"]) for row in log)]
    taus = [start, *(float(row["tau_1"]) for row in log)]
    wanted = iter(np.interp(range(2, settings.steps + 2), steps, taus))

    def clamp(loss):
        loss.log_tau.data[0] = math.log(next(wanted))

    return clamp


def load(path):
    """A checkpoint -> its model, where the cards are."""
    return cc.load(path, get_cards().device)


def evaluate(models, seed):
    """Yields (model, measure, task, percent), means of two draws of images: the mean of the six
    classifiers by shots, two rivals by shots, zero-shot on the tasks of known words."""
    tasks = fs.card_tasks(get_cards())
    validation = fs.validation_tasks(get_cards())
    methods = ["zero-shot", *fs.TRAINING_FREE, "GDA", "linear probe"]
    chosen = list(fs.choose(models, validation, methods, [1, 4, 16], 16))
    found = {}
    draws = [2 * seed, 2 * seed + 1]
    for row in fs.evaluate(models, tasks, chosen, draws, shots=16, queries=16):
        name = "" if row["method"] in fs.TRAINING_FREE else row["method"]
        measure = f"{name} {row['shots']}-shot" if row["shots"] else name
        key = row["model"], measure.strip(), row["task"]
        found.setdefault(key, []).append(row["accuracy"])
    for key, values in found.items():
        yield *key, round(np.mean(values), 3)


def measure(args, points, evaluate=evaluate):
    """Rows of what `evaluate` yields at points {name: {model: its settings}}, of models that see
    the same images: measured and written, or with --draw those of the file."""
    if not args.draw:
        rows = []
        columns = ["of", "seed", "model", "measure", "task", "percent"]
        for (of, pair), seed in product(points.items(), range(args.seeds)):
            models = {name: load(train(seed, **settings)) for name, settings in pair.items()}
            for values in evaluate(models, seed):
                rows.append(dict(zip(columns, (of, seed, *values), strict=True)))
        cc.write_csv(args.table, rows)
    return read_rows(args.table)


def read_rows(path):
    """The rows of a CSV file, each {column: text}."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def names_of(rows, column):
    """What is in a column, each once."""
    return list(dict.fromkeys(row[column] for row in rows))


def select(rows, column="percent", **where):
    """The numbers in a column of the rows that have these values, (n, seeds)."""
    rows = [row for row in rows if where.items() <= row.items()]
    values = [float(row[column]) for row in rows]
    seeds = len(names_of(rows, "seed"))
    return np.reshape(values, (seeds, -1)).T


# ---- Tables and pictures -------------------------------------------------------------------------
def print_pairs(rows):
    """Print the means of both models, their difference with its 95 % interval, and the least and
    the greatest difference of single seeds."""
    for of, name in product(names_of(rows, "of"), names_of(rows, "measure")):
        models = names_of(rows, "model")
        a, b = (select(rows, of=of, measure=name, model=model) for model in models)
        means = f"{a.mean():6.1f}{b.mean():6.1f}   {fs.signed(b - a):15}"
        seeds = np.round((b - a).mean(0), 1) + 0.0  # no -0.0
        print(f"{of:20}{name:25}{means}{seeds.min():+.1f} to {seeds.max():+.1f}")


def compare(args, points, evaluate=evaluate):
    """Rows of a baseline and a context model at points {name: changed settings}, printed."""
    pairs = {}
    for of, changes in points.items():
        pairs[of] = {model: {"objective": model} | changes for model in args.pair}
    rows = measure(args, pairs, evaluate)
    print_pairs(rows)
    return rows


def draw_panels(args, panels):
    """Draw side by side {title: (name of x, ticks or None, curves)}, a curve (label, x (n,), y (n,
    seeds), color, style): a line through the means, with a dot for each seed."""
    figure = Figure((9, 4), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=args.study == "sizes")
    for axis, title in zip(axes, panels, strict=True):
        across, ticks, curves = panels[title]
        for label, x, y, color, style in curves:
            axis.plot(x, np.mean(y, 1), style, color=color, label=label)
            marker = "x" if style == "--" else "."
            axis.plot(x, y, marker, color=color)
        if ticks:
            axis.set_xticks(range(len(ticks)), ticks)
        axis.set(title=title, xlabel=across)
        axis.grid()
        axis.legend()
    figure.savefig(args.picture)


def curves_of(args, rows, points, measure, style, more=""):
    """Curves of both models, through these points."""
    curves = []
    for model, (label, color) in zip(args.pair, KINDS, strict=True):
        y = [select(rows, of=of, model=model, measure=measure).mean(0) for of in points]
        x = range(len(points))
        curves.append((label + more, x, y, color, style))
    return curves


# ---- Sweeps of a setting -------------------------------------------------------------------------
def sweep(args, setting, values, across, ticks):
    """Zero-shot and 16-shot accuracy of both models by the values of a setting."""
    points = {f"{value:g}": {setting: value} for value in values}
    rows = compare(args, points)
    panels = {}
    for name in ("zero-shot", "16-shot"):
        curves = curves_of(args, rows, points, name, "-")
        panels[f"{name} accuracy (%)"] = across, ticks, curves
    draw_panels(args, panels)


def tau_max(args):
    caps = [6.0, 9.0, 14.0, 28.0, 100.0]
    ticks = [6, 9, 14, 28, "none"]
    sweep(args, "tau_max", caps, "cap of tau_1 and tau_2", ticks)


def number_share(args):
    shares = [1.0, 0.99, 0.97, 0.9]
    ticks = ["0 %", "1 %", "3 %", "10 %"]
    sweep(args, "number_share", shares, "captions without the number", ticks)


WIDTHS = [(32, 3200), (64, 3200), (128, 3200)]  # with steps
LENGTHS = [(64, 1600), (64, 3200), (64, 6400)]


def sizes_of(args):
    """{"width steps cap": settings} of the models of `sizes`; SigLIP's have no cap."""
    points = {}
    for width, steps in WIDTHS + LENGTHS:
        for cap in [100.0] if args.sigmoid else [100.0, 9.0]:
            settings = {"width": width, "steps": steps, "tau_max": cap}
            points[f"{width} {steps} {cap:g}"] = settings
    return points


def sizes(args):
    rows = compare(args, sizes_of(args))
    panels = {}
    for place, (across, points) in enumerate((("width", WIDTHS), ("steps", LENGTHS))):
        curves = []
        for cap, style, more in ((100, "--", ", no cap"), (9, "-", ", cap 9")):
            of = [f"{width} {steps} {cap}" for width, steps in points]
            if of[0] in names_of(rows, "of"):
                curves += curves_of(args, rows, of, "16-shot", style, more)
        ticks = [point[place] for point in points]
        panels[f"16-shot accuracy (%) by {across}"] = across, ticks, curves
    draw_panels(args, panels)


# ---- Parts of the method -------------------------------------------------------------------------
ABLATIONS = {
    "no context": {"alpha": 1.0},
    "1 no self-mask": {"no_mask": True},
    "2 alpha 0.6": {"alpha": 0.6},
    "3 values detached": {"detach_values": True},
    "tau_1 = tau_2": {"shared_temperature": True},
}


def ablations(args):
    """Differences from the whole method; with SigLIP after 6,400 steps, for before, context adds
    nothing there. The picture shows both losses."""
    steps = 6400 if args.sigmoid else DEFAULT.steps
    whole = {"objective": args.pair[1], "steps": steps}
    points = {}
    for of, change in ABLATIONS.items():
        points[of] = {"whole": whole, "changed": whole | change}
    print_pairs(measure(args, points))
    figure = Figure((9, 4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    places = np.arange(len(ABLATIONS))
    clip = "CLIP", "ablations.csv", places, GREEN
    siglip = "SigLIP", "ablations-sigmoid.csv", places + 0.2, "#CC79A7"
    for loss, file, y, color in (clip, siglip):
        rows = read_rows(FIGURES / file)
        for axis, name in zip(axes, ("zero-shot", "16-shot"), strict=True):
            gains = []
            for of in ABLATIONS:
                whole = select(rows, of=of, measure=name, model="whole")
                changed = select(rows, of=of, measure=name, model="changed")
                gains.append(fs.interval(changed - whole))
            means, widths = np.transpose(gains)
            axis.errorbar(means, y, xerr=widths, fmt="o", color=color, label=loss)
            axis.set(title=f"{name} accuracy", xlabel="change against the whole method (points)")
            axis.axvline(0, color="gray")
    axes[0].legend()
    axes[0].set_yticks(places, ABLATIONS)
    axes[0].invert_yaxis()
    figure.savefig(args.picture)


def post(args):
    """A finished baseline, continued for some steps without and with context."""
    points = {f"{steps}": {"steps": steps, "post": True} for steps in (25, 100, 400)}
    compare(args, points)


def replay(args):
    """Both models with the tau_1 that one of them had, step by step."""
    steps = 6400 if args.sigmoid else DEFAULT.steps
    points = {f"tau_1 of {model}": {"steps": steps, "tau_of": model} for model in args.pair}
    compare(args, points)


# ---- During training -----------------------------------------------------------------------------
def training(args):
    """tau_1 and 16-shot accuracy on the validation tasks, from the logs of both models."""
    if not args.draw:
        rows = []
        for objective, seed in product(args.pair, range(args.seeds)):
            log = train(seed, objective=objective).with_suffix(".csv")
            labels = {"model": objective, "seed": seed}
            rows += (labels | row for row in read_rows(log))
        cc.write_csv(args.table, rows)
    rows = read_rows(args.table)
    panels = {}
    for column, title in (("tau_1", "tau_1"), ("16-shot", "16-shot accuracy (%), validation")):
        curves = []
        for model, (label, color) in zip(args.pair, KINDS, strict=True):
            steps = select(rows, "step", model=model)[:, 0]
            y = select(rows, column, model=model)
            curves.append((label, steps, y, color, "-"))
        panels[title] = "step", None, curves
    draw_panels(args, panels)


# ---- What is near what ---------------------------------------------------------------------------
@cache
def draw_batch(seed):
    """A batch as trained: images (B, 1, 32, 32), captions, whether a pair has the same character
    (B, B), and the digits of the numbers (B, 3). Drawn once for all models, so do not change it."""
    torch.manual_seed(seed)
    cards = get_cards()
    numbers = cc.draw_different(1000, DEFAULT, cards.device)
    rows = cards.train[cc.integers(numbers, 0, len(cards.train))]
    images = cc.draw_cards(cards, rows, numbers, "train")
    pairs = zip(rows.tolist(), numbers.tolist(), strict=True)
    captions = [f"{cards.names[row]} {cc.spell(number)}" for row, number in pairs]
    digits = numbers[:, None] // torch.tensor([100, 10, 1]).to(numbers) % 10
    same = (rows[:, None] == rows).fill_diagonal_(False)
    return images, captions, same, digits


@torch.no_grad()
def nearness_of(model, seed):
    """{measure: number} of a batch. Is a card with the same character nearer than one with two
    equal digits, and than any with another character (% of cases)? Of the 511 wrong captions, how
    many does the plain loss still see (effective number), and which weight have those with two
    equal digits (%)? Does a contextualised embedding find its own caption (%)?"""
    images, captions, same, digits = draw_batch(seed)
    i = torch.arange(B, device=images.device)
    v = model.encode_image(images)
    X = F.normalize(v)
    tokens = cc.tokenize(captions, model.vocabulary).to(i.device)
    T = F.normalize(model.encode_text(tokens))
    others = ~same.clone().fill_diagonal_(True)
    two = others & ((digits[:, None] == digits).sum(2) == 2)
    a, b = same.nonzero(as_tuple=True)  # pairs with the same character
    cosines = X @ X.T
    farther = cosines[a] < cosines[a, b][:, None]  # (pairs, B): farther from a than b is

    tau, _, _, bias, _ = model.loss.scalars().values()
    logits = (tau * X @ T.T).fill_diagonal_(-math.inf)
    weights = logits.softmax(1)
    if model.settings.is_sigmoid:
        weights = F.normalize((logits + bias).sigmoid(), p=1)
    X_ctx = cc.contextualize(i, X, v, 0.125 / model.settings.width**0.5)
    return {
        "nearer than two digits": 100 * (farther & two[a]).sum() / two[a].sum(),
        "nearer than any other": 100 * (farther & others[a]).sum() / others[a].sum(),
        "wrong captions seen": (1 / weights.square().sum(1)).mean(),
        "weight of two digits": 100 * (weights * two).sum(1).mean(),
        "own caption found": cc.percent_right(X_ctx @ T.T, i),
    }


def measure_nearness(models, seed=0):
    """Yields (model, measure, "", mean of eight batches)."""
    for name, model in models.items():
        found = [nearness_of(model, batch) for batch in range(8)]
        for key in found[0]:
            yield name, key, "", round(np.mean([float(row[key]) for row in found]), 3)


def nearness(args):
    """Of the models of `sizes`, or of --checkpoint."""
    if args.checkpoint:
        for row in measure_nearness({path: load(path) for path in args.checkpoint}):
            print(*row)
    else:
        compare(args, sizes_of(args), measure_nearness)


# ---- Pictures of cards ---------------------------------------------------------------------------
def draw_grid(args, cells, columns, scale=1):
    """Draw cells (image (1, S, S), title, color of a frame), row by row."""
    rows = len(cells) // columns
    figure = Figure((scale * columns, 1.2 * scale * rows), layout="constrained")
    axes = figure.subplots(rows, columns).flat
    for axis, (image, title, color) in zip(axes, cells, strict=True):
        pixels = image[0].numpy(force=True)
        axis.imshow(pixels, cmap="gray", vmin=0, vmax=1)
        axis.set_title(title, fontsize=8)
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set(color=color, linewidth=3)
    figure.savefig(args.picture)


def attention(args):
    """The three cards of a batch from which the context model attends most to the same character,
    and the eight that each attends to most, in the baseline and in the context model. Both attend
    with the tau_ctx that the context model has learned. Prints, for the whole batch, how many times
    their share of the attention have cards with the same character, and cards with two digits in
    common."""
    models = [load(train(0, objective=name)) for name in args.pair]
    tau_ctx = models[1].loss.scalars()["tau_ctx"]
    images, captions, same, digits = draw_batch(1)
    counts = F.one_hot(digits).sum(1)
    common = torch.minimum(counts[:, None], counts).sum(2).fill_diagonal_(0) >= 2
    i = torch.arange(B, device=images.device)
    attend = {}
    for (name, _), model in zip(KINDS, models, strict=True):
        X = cc.embed_images(model, images)
        attend[name] = cc.contextualize(i, X, torch.eye(B).to(X), tau_ctx)
        shares = [attend[name][pairs].mean() * (B - 1) for pairs in (same, common)]
        print(name, *(f"{share:.1f}" for share in shares))
    cells = []
    queries = (attend["context model"] * same).sum(1).topk(3).indices.tolist()
    for query, name in product(queries, attend):
        weights = attend[name][query]
        cells.append((images[query], name, "black"))
        for j in weights.topk(8).indices.tolist():
            color = "#E69F00" if common[query, j] else "white"
            color = GREEN if same[query, j] else color
            cells.append((images[j], f"{weights[j]:.1%}", color))
    draw_grid(args, cells, 9)


def cards(args):
    """18 training cards with their captions."""
    images, captions, *_ = draw_batch(0)
    cells = []
    for image, caption in zip(images[:18], captions[:18], strict=True):
        cells.append((image, textwrap.fill(caption, 25), "white"))
    draw_grid(args, cells, 6, scale=1.9)


# ---- The command line ----------------------------------------------------------------------------
STUDIES = ["cards", "attention", "sizes", "tau_max", "nearness", "number_share", "training"]
STUDIES += ["ablations", "post", "replay"]  # each is a function of this file


def run(args):
    args.pair = ("siglip", "siglixp") if args.sigmoid else ("clip", "clixp")
    name = f"{args.study}-sigmoid" if args.sigmoid else args.study
    args.table, args.picture = FIGURES / f"{name}.csv", FIGURES / f"{name}.png"
    globals()[args.study](args)


def main(arguments=None):
    parser = argparse.ArgumentParser("study", argparse.SUPPRESS, __doc__.splitlines()[0])
    add = parser.add_argument
    add("study", choices=STUDIES)
    add("--seeds", type=int, default=3, help="of training (3)")
    add("--draw", action="store_true", help="only print and draw again, from the CSV file")
    add("--sigmoid", action="store_true", help="siglip and siglixp instead of clip and clixp")
    add("--checkpoint", nargs="+", default=[], help="models, of nearness")
    cc.run_program(parser, run, arguments)


if __name__ == "__main__":
    main()
