"""The studies of the README: each one command, with a CSV file and a picture in figures/.

python figures/study.py ablations      context with one part changed
python figures/study.py tau_max        both models at caps of the temperatures
python figures/study.py number_share   or steps, width: both models at values of a setting
python figures/study.py post           a finished base, continued without and with context
python figures/study.py emergence      losses, temperatures, accuracy in training; frontier.png
python figures/study.py variance       what embeddings carry: the character, the number
python figures/study.py attention      which cards an image attends to
python figures/study.py cards          training cards with their captions
python figures/study.py real           images of --data DIR [DIR ...] as they are and with plates
python figures/study.py speed          against the plain PyTorch way, on cards or --data DIR
"""

import argparse
import csv
import os
import sys
import tempfile
import textwrap
import time
from dataclasses import replace
from functools import cache, partial
from itertools import chain, product, repeat
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from torchvision import datasets, transforms

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import contextclip as cc  # noqa: E402
import fewshot as fs  # noqa: E402

FIGURES, RUNS = Path(__file__).resolve().parent, Path("runs/study")
DEFAULT = cc.Settings("clixp")
SHOTS = {"zero-shot": "0", "1-shot": "1", "4-shot": "4", "16-shot": "16"}
COLORS = ["#D55E00", "#0072B2", "#009E73", "#555555"]


# ---- Training ------------------------------------------------------------------------------------
@cache
def get_cards():
    """The cards that all models see."""
    return cc.Cards(cc.choose_device(cpu=False), DEFAULT)


def get_objectives(args):
    """The names of the base's objective and of that with context."""
    return ("siglip", "siglixp") if args.sigmoid else ("clip", "clixp")


def train(seed, **changes):
    """Train a model with changes of the default settings, if it is not there -> its checkpoint."""
    settings = replace(DEFAULT, seed=seed, **changes)
    parts = []
    for name, value in changes.items():
        if name == "init":
            parts.append("post")
        elif name != "objective" and value != getattr(DEFAULT, name):
            parts.append(f"{name}={value:g}")
    folder = RUNS / ("-".join(parts) or "default") / f"seed{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    cc.train(settings, get_cards(), folder)
    return folder / f"{settings.objective}.pt"


def load(path):
    return cc.load(path, get_cards().device)


# ---- Tables and curves ---------------------------------------------------------------------------
def read_rows(path):
    """The rows of a CSV file, each {column: text}."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def print_table(rows, path=None):
    """Print dictionaries of the same keys, a line each."""
    lines = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(map(str.ljust, line, widths)))


def draw_panels(panels, path, scale="linear"):
    """Draw side by side {(name of x, of y): [(label, x, y, error, line, color)]}."""
    figure = Figure((4.3 * len(panels), 3.8), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, ((across, up), lines) in zip(axes, panels.items(), strict=True):
        for label, x, y, error, line, color in lines:
            axis.errorbar(x, y, error, fmt=line, color=color, label=label, markersize=4, capsize=2)
        axis.set(xlabel=across, ylabel=up)
        if scale == "log":
            axis.set_xscale(scale)
            axis.set_xticks(x, [f"{value:g}" for value in x])
            axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=130)


# ---- Ablations and sweeps ------------------------------------------------------------------------
def sweep(setting, values, **others):
    """{value: settings changed to it}."""
    return {f"{value:g}": {setting: value} | others for value in values}


SWEEPS = {
    "ablations": {
        "no self-mask": {"no_mask": True},
        "alpha 0.6": {"alpha": 0.6},
        "shared temperature": {"shared_temperature": True},
        "detached values": {"detach_values": True},
    },
    "tau_max": sweep("tau_max", [100, 28, 14, 9, 6, 4]),
    "number_share": sweep("number_share", [0, 0.5, 0.9, 1]),
    "steps": sweep("steps", [400, 800, 1600, 3200]),
    "width": sweep("width", [32, 64, 128]),
    "post": sweep("steps", [25, 100, 400], lr=5e-4),
}


def get_pairs(args):
    """{point of the sweep: {model: changed settings}}, two models that see the same images."""
    base, context = get_objectives(args)
    plain, whole = ({"objective": o, "tau_max": args.cap} for o in (base, context))
    points = SWEEPS[args.study]
    if args.study == "ablations":
        points = {base: plain} | points
        return {of: {context: whole, "changed": whole | points[of]} for of in points}
    return {of: {base: plain | points[of], context: whole | points[of]} for of in points}


def measure_sweep(args):
    """Train and evaluate: rows of accuracies on the 21 tasks, the mean of the six classifiers and
    of two draws of images; zero-shot on the tasks of known words."""
    trained = []
    for seed, (of, pair) in product(range(args.seeds), get_pairs(args).items()):
        start = {}
        if args.study == "post":
            base = train(seed, objective=get_objectives(args)[0], tau_max=args.cap)
            start = {"init": str(base)}
        paths = {model: train(seed, **start, **changes) for model, changes in pair.items()}
        trained.append((seed, of, paths))

    torch.set_num_threads(1)  # as in fewshot.py
    cards, shots, methods = get_cards(), [1, 4, 16], ["zero-shot", *fs.TRAINING_FREE]
    tasks = fs.card_tasks(cards)
    validation = [fs.CardTask(cards, f"{rows[0]}", rows, "validation") for rows in cards.validation]
    for seed, of, paths in trained:
        models = {model: load(path) for model, path in paths.items()}
        chosen = [*fs.choose(models, validation, methods, shots, queries=16)]
        draws = (2 * seed, 2 * seed + 1)
        rows = fs.evaluate(models, tasks, chosen, draws, max(shots), queries=16)
        table = fs.tabulate(rows, shots, runs=1, draws=len(draws))
        for model, k in product(models, [0, *shots]):
            row = {"of": of, "model": model, "seed": seed, "shots": k}
            values = table[model][fs.MEAN if k else "zero-shot", k].mean(1)
            # zero-shot: of the first tasks, those of known words
            for task, accuracy in zip(tasks, values, strict=False):
                yield row | {"task": task.name, "accuracy": round(accuracy, 3)}


def show_sweep(rows, path):
    """Print both models' accuracies and their difference; draw."""
    cells, seeds = {}, {row["seed"] for row in rows}
    for row in rows:  # seed by seed, task by task
        models = cells.setdefault(row["of"], {}).setdefault(row["shots"], {})
        models.setdefault(row["model"], []).append(float(row["accuracy"]))
    lines, curves = [], {}
    for of, table in cells.items():
        line = {path.stem: of}
        for shots, k in SHOTS.items():
            pair = [np.reshape(values, (len(seeds), -1)).T for values in table[k].values()]
            means = [f"{values.mean():.1f}" for values in pair]
            line[shots] = ", ".join([*means, fs.signed(pair[1] - pair[0])])
            curves.setdefault(shots, []).append(pair)  # (tasks, seeds) each
        lines.append(line)
    names = list(dict.fromkeys(row["model"] for row in rows))
    print(f"{', '.join(names)}, {names[1]} - {names[0]}: % right, 95 % interval")
    print_table(lines)
    draw = draw_both if path.stem.startswith("tau_max") else draw_differences
    draw(names, list(cells), curves, path)


def draw_both(names, points, curves, path):
    """Accuracies of both models against a cap; bars from the lowest seed to the highest."""
    panels = {}
    for shots in ("zero-shot", "16-shot"):
        panels["cap of tau_1 and tau_2", f"{shots}, % right"] = lines = []
        for i, name in enumerate(names):
            seeds = np.array([pair[i].mean(0) for pair in curves[shots]])
            y = seeds.mean(1)
            bars = [y - seeds.min(1), seeds.max(1) - y]
            lines.append((name, list(map(float, points)), y, bars, "o-", COLORS[i]))
    draw_panels(panels, path, "log")


def draw_differences(names, points, curves, path):
    """Differences of the two models, with 95 % intervals, at each point of the sweep."""
    lines, x = [], [of.replace(" ", "\n") for of in points]
    for (shots, pairs), color in zip(curves.items(), COLORS, strict=True):
        y, bars = zip(*(fs.interval(pair[1] - pair[0]) for pair in pairs), strict=True)
        lines.append((shots, x, y, bars, "s-", color))
    draw_panels({(path.stem, f"{names[1]} - {names[0]}, points of accuracy"): lines}, path)


# ---- During training -----------------------------------------------------------------------------
PANELS = {
    "loss in nats": ["plain_loss", "context_loss"],
    "temperatures": ["tau_1", "tau_2"],
    "tau_ctx sqrt(d)": ["tau_ctx sqrt(d)"],
    "validation, % right": list(SHOTS),
}
OF_CONTEXT = "context_loss", "tau_2", "tau_ctx sqrt(d)"  # the base does not learn them


def measure_emergence(args):
    """The rows of the logs of both models' training."""
    for objective, seed in product(get_objectives(args), range(args.seeds)):
        path = train(seed, objective=objective, tau_max=args.cap)
        for text in read_rows(path.with_suffix(".csv")):
            row = {column: float(value) for column, value in text.items()}
            row["tau_ctx sqrt(d)"] = row["tau_ctx"] * DEFAULT.width**0.5
            row = {column: round(value, 3) for column, value in row.items()}
            yield {"model": objective, "seed": seed} | row | {"step": text["step"]}


def show_emergence(rows, path):
    """Draw the logs over steps; draw and print the way of zero-shot and 16-shot accuracy."""
    panels = {("step", title): [] for title in PANELS}
    frontier, lines, models = [], [], dict.fromkeys(row["model"] for row in rows)
    for model, color in zip(models, COLORS, strict=False):
        steps = {}
        for row in rows:
            if row["model"] == model:
                steps.setdefault(int(row["step"]), []).append(row)

        def mean(column, steps=steps):  # over seeds, at each step
            return np.array([np.mean([float(r[column]) for r in s]) for s in steps.values()])

        has_context = model.endswith("xp")
        for title, columns in PANELS.items():
            for column, shade in zip(columns, COLORS, strict=False):
                if has_context or column not in OF_CONTEXT:
                    line = (f"{column}, {model}", [*steps], mean(column), None)
                    panels["step", title].append((*line, "-" if has_context else "--", shade))

        zero, few = mean("zero-shot"), mean("16-shot")
        frontier.append((model, zero, few, None, ".-", color))
        frontier.append((f"{model}, end", zero[-1:], few[-1:], None, "D", color))
        for point, i in (("best 16-shot", few.argmax()), ("end", -1)):
            line = {"model": model, "point": point, "step": [*steps][i]}
            lines.append(line | {"zero-shot": f"{zero[i]:.1f}", "16-shot": f"{few[i]:.1f}"})
    print_table(lines)
    draw_panels(panels, path)
    frontier_path = path.with_name(path.name.replace("emergence", "frontier"))
    draw_panels({("zero-shot, % right", "16-shot, % right"): frontier}, frontier_path)


# ---- What embeddings carry -----------------------------------------------------------------------
def split_digits(numbers):
    """(n,) -> (n, 3)."""
    return torch.stack([numbers // 100, numbers // 10 % 10, numbers % 10], 1)


def measure_variance(args):
    """Percent of the embeddings' variance that character, and number, explain linearly."""
    cards = get_cards()
    for objective, seed in product(cc.OBJECTIVES, range(args.seeds)):
        model = load(train(seed, objective=objective, tau_max=args.cap))
        torch.manual_seed(1)
        characters = torch.arange(100, device=cards.device).repeat(80)
        numbers = cc.integers(characters, 0, 1000)
        images = cc.draw_cards(cards, cards.train[characters], numbers, "train")
        x = cc.embed_images(model, images).cpu()
        x = x - x.mean(0)
        row = {"objective": objective, "seed": seed}
        causes = {"character": characters[:, None], "number": split_digits(numbers)}
        for name, cause in causes.items():
            A = F.one_hot(cause).flatten(1).float().cpu()
            explained = A @ torch.linalg.lstsq(A, x).solution
            row[name] = round(100 * (explained.square().sum() / x.square().sum()).item(), 3)
        yield row


# ---- Pictures ------------------------------------------------------------------------------------
def draw_grid(cells, size, path):
    """Draw rows of cells (image (1, S, S), title, color of a frame)."""
    figure = Figure((size[0] * len(cells[0]), size[1] * len(cells)), layout="constrained")
    axes = figure.subplots(len(cells), len(cells[0]), squeeze=False).flat
    for axis, (image, title, color) in zip(axes, chain(*cells), strict=True):
        axis.imshow(image[0].numpy(force=True), cmap="gray", vmin=0, vmax=1)
        axis.set_title(title, fontsize=8)
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set(color=color, linewidth=3)
    figure.savefig(path, dpi=130)


def draw_attention(args, path):
    """Cards and the six each attends to most, at the context model's tau_ctx: green the same
    character, orange two digits in common; print the shares."""
    cards, (base, context) = get_cards(), get_objectives(args)
    models = {name: load(train(0, objective=name, tau_max=args.cap)) for name in (context, base)}
    tau_ctx = models[context].scalars()[2]
    torch.manual_seed(1)
    i = torch.arange(DEFAULT.batch_size, device=cards.device)
    characters = cards.train[cc.integers(i, 0, len(cards.train))]
    numbers = cc.integers(i, 0, 1000)
    images, digits = cc.draw_cards(cards, characters, numbers, "train"), split_digits(numbers)
    same = (characters[:, None] == characters) & (i[:, None] != i)
    alike = ((digits[:, None] == digits).sum(2) >= 2) & (characters[:, None] != characters)

    lines, cells = [], [[] for _ in range(5)]
    for name, model in models.items():
        X = cc.embed_images(model, images)
        weights = 100 * cc.contextualize(i, X, torch.eye(len(X)).to(X), tau_ctx)  # percent
        for kind, cause in (("the same character", same), ("two digits in common", alike)):
            share = (weights * cause).sum(1)[cause.any(1)].mean()
            lines.append({"model": name, "attention to": kind, "%": f"{share:.1f}"})
        for row, query in zip(cells, same.any(1).nonzero()[:, 0], strict=False):
            row.append((images[query], name, "black"))
            for j in weights[query].topk(6).indices:
                color = COLORS[2] if same[query, j] else "#E69F00" if alike[query, j] else "white"
                row.append((images[j], f"{weights[query, j]:.1f} %", color))
    print_table(lines)
    draw_grid(cells, (1, 1.2), path)


def draw_cards(args, path):
    """18 training cards with their captions."""
    cards, cells = get_cards(), []
    torch.manual_seed(0)
    images, tokens = cards.draw_batch(replace(DEFAULT, batch_size=18))
    words = list(cards.vocabulary)
    for image, row in zip(images, tokens.tolist(), strict=True):
        caption = " ".join(words[token] for token in row if token)
        cells.append((image, textwrap.fill(caption, 25), "white"))
    draw_grid([cells[:6], cells[6:12], cells[12:]], (1.9, 2.3), path)


def draw_real(args, path):
    """Images of your own, a row per folder of class folders: as they are, and with plates."""
    cells = []
    for source in args.data:
        images = datasets.ImageFolder(source, cc.preprocess(DEFAULT))
        places = np.linspace(0, len(images) - 1, 6).astype(int)
        images = torch.stack([images[i][0] for i in places])
        images = [*images, *fs.with_plates(images, get_cards())]
        cells.append([(image, Path(source).name, "white") for image in images])
    draw_grid(cells, (1, 1.2), path)


# ---- Speed ---------------------------------------------------------------------------------------
def draw_plainly(cards, character):
    """A training card as `cc.draw_cards` draws it, by Pillow: image (1, 32, 32), tokens (L,)."""
    faces = cards.has_glyph[cards.train[character], cc.FACE_SPLITS["train"]]
    glyph = cards.glyphs[cards.train[character], torch.multinomial(faces.float(), 1)][0]
    affine = transforms.RandomAffine(9, (0.16, 0.16), (0.8, 1.6), 11, Image.Resampling.BILINEAR)
    image, number = affine(Image.fromarray(glyph.numpy())), int(torch.randint(1000, ()))
    plate = Image.fromarray(cards.plates[number, torch.randint(len(faces), ())].numpy())
    image.paste(plate, (int(torch.randint(9, ())), int(torch.randint(4, ()) + 20 * torch.randint(2, ()))))
    background, ink = 0.3 * torch.rand(()), 0.6 + 0.4 * torch.rand(())
    image = torch.lerp(background, ink, transforms.functional.to_tensor(image))
    if torch.rand(()) < 0.5:
        image = 1 - image
    tokens = cards.tokens[character].clone()
    end = (tokens != 0).sum()
    tokens[end : end + 4] = cards.number_tokens[number]
    return image + 0.04 * torch.rand(1, 32, 32) - 0.02, tokens
