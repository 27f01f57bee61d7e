"""The studies of the README: each one command, with a CSV file and a picture in figures/.

python figures/study.py ablations      context with one part changed
python figures/study.py tau_max        both models at caps of the temperatures
python figures/study.py number_share   both models, by the share of captions that name the number
python figures/study.py post           a finished base, continued without and with context
python figures/study.py replay         both models, each also with the tau_1 of the other
python figures/study.py emergence      losses, temperatures, accuracy in training
python figures/study.py variance       what embeddings carry, at the caps of tau_max
python figures/study.py attention      which cards an image attends to
python figures/study.py cards          training cards with their captions
python figures/study.py speed          against the plain PyTorch way, on captions, --data DIR
"""

import argparse
import csv
import os
import sys
import tempfile
import textwrap
from dataclasses import replace
from functools import cache, partial
from itertools import chain, count, product, repeat
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torchvision import datasets, transforms

FIGURES = Path(__file__).resolve().parent
sys.path.insert(0, str(FIGURES.parent))
import contextclip as cc  # noqa: E402
import fewshot as fs  # noqa: E402

RUNS = Path("runs/study")
DEFAULT = cc.Settings("clixp")
B = DEFAULT.batch_size
SHOTS = ["zero-shot", "1-shot", "4-shot", "16-shot"]
COLORS = ["#0072B2", "#D55E00", "#009E73", "#555555"]


# ---- Training, tables, curves --------------------------------------------------------------------
@cache
def get_cards():
    """The cards that all models see."""
    return cc.Cards(cc.choose_device(cpu=False))


def train(seed, tau_of=None, **changes):
    """Train a model with changes of the default settings, if it is not there -> its checkpoint.
    tau_of: an objective, whose tau_1 it has, step by step."""
    settings = replace(DEFAULT, seed=seed, **changes)
    if tau_of == settings.objective:
        tau_of = None
    changed = [
        f"{name}={value}"
        for name, value in (changes | {"tau_of": tau_of}).items()
        if name != "objective" and value != getattr(DEFAULT, name, None)
    ]
    folder = RUNS / ("-".join(changed).replace("/", ".") or "default") / f"seed{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    path, loss = folder / f"{settings.objective}.pt", cc.lixp_loss
    if tau_of:
        loss = replay(train(seed, **changes | {"objective": tau_of}), path)
    with mock.patch.object(cc, "lixp_loss", loss):
        cc.train(settings, get_cards(), folder)
    return path


def replay(other, path):
    """`lixp_loss` with tau_1 of another model's log; a run at `path` goes on where it stopped."""
    log, own, loss = read_rows(other.with_suffix(".csv")), path.with_suffix(".csv"), cc.lixp_loss
    now = count(int(read_rows(own)[-1]["step"]) + 1 if own.exists() else 1)
    steps, taus = numbers_of(log, "step"), numbers_of(log, "tau_1")

    def lixp_loss(v, u, scalars, settings):  # scalars[0] has no gradient, stays where it starts
        tau_1 = np.interp(next(now), [0, *steps], [scalars[0].item(), *taus])
        return loss(v, u, torch.cat((scalars.new_tensor([tau_1]), scalars[1:])), settings)

    return lixp_loss


def load(path):
    """A checkpoint -> its model, where the cards are."""
    return cc.load(path, get_cards().device)


def read_rows(path):
    """The rows of a CSV file, each {column: text}."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def numbers_of(rows, column, **where):
    """A column of the rows that have these values."""
    return [float(row[column]) for row in rows if where.items() <= row.items()]


def select(rows, column, **where):
    """The same of rows seed by seed, (n, seeds)."""
    return np.reshape(numbers_of(rows, column, **where), (len(names_of(rows, "seed")), -1)).T


def names_of(rows, column):
    """What is in a column, each once."""
    return list(dict.fromkeys(row[column] for row in rows))


def print_table(rows, path=None):
    """Print dictionaries of the same keys, a line each."""
    for cells in (rows[0], *(row.values() for row in rows)):
        print(*(f"{cell!s:24}" for cell in cells))


def draw_panels(panels, path, ticks=()):
    """Draw side by side {(name of x, of y): [(label, x, y, style, color)]}; `ticks`: a log x."""
    figure = Figure((4.3 * len(panels), 3.8), layout="constrained")
    for place, ((across, up), lines) in enumerate(panels.items(), start=1):
        axis = figure.add_subplot(1, len(panels), place)
        for label, x, y, style, color in lines:
            axis.plot(x, y, style, color=color, label=label)
        axis.set(xlabel=across, ylabel=up)
        if ticks:
            axis.set_xscale("symlog", linthresh=1)  # linear from 0 to 1
            axis.set_xticks(ticks, [f"{value:g}" for value in ticks])
            axis.minorticks_off()
        axis.grid()
        axis.legend(fontsize=7, framealpha=0.5)
    figure.savefig(path)


# ---- Ablations and sweeps ------------------------------------------------------------------------
def sweep(setting, values):
    """{value: changed settings}."""
    return {f"{value:g}": {setting: value} for value in values}


CAPS = sweep("tau_max", [100.0, 28.0, 14.0, 9.0, 6.0])
SWEEPS = {
    "ablations": {
        "no mask": {"no_mask": True},
        "alpha 0.6": {"alpha": 0.6},
        "one tau": {"shared_temperature": True},
        "V detached": {"detach_values": True},
    },
    "tau_max": CAPS,
    "variance": CAPS,
    "number_share": sweep("number_share", [0.9, 1.0]),
    "post": sweep("steps", [25, 100, 400]),
    "replay": {},
}


def get_pairs(args):
    """{point of the sweep: {model: changed settings}}, two models that see the same images."""
    base, context = ({"objective": model} | args.all for model in args.pair)
    points = SWEEPS[args.study]
    if args.study == "ablations":
        points = {args.base: base} | points
        return {of: {args.context: context, "changed": context | c} for of, c in points.items()}
    if args.study == "replay":
        points = {f"tau_1 of {model}": {"tau_of": model} for model in args.pair}
    return {of: {args.base: base | c, args.context: context | c} for of, c in points.items()}


def measure_sweep(args):
    """Train and evaluate: rows of accuracies on the 21 tasks, the mean of the six classifiers and
    of two draws of images; zero-shot on the tasks of known words."""
    cards, methods = get_cards(), ["zero-shot", *fs.TRAINING_FREE]
    tasks = fs.card_tasks(cards)
    validation = fs.validation_tasks(cards)
    for (of, pair), seed in product(get_pairs(args).items(), range(args.seeds)):
        start = {}
        if args.study == "post":
            base = train(seed, objective=args.base, **args.all)
            start = {"init": str(base), "lr": 5e-4}
        models = {name: load(train(seed, **start, **changes)) for name, changes in pair.items()}
        chosen = [*fs.choose(models, validation, methods, [1, 4, 16], queries=16)]
        draws, found = [2 * seed, 2 * seed + 1], {}
        for row in fs.evaluate(models, tasks, chosen, draws, shots=16, queries=16):
            key = row["model"], row["shots"], row["task"]
            found.setdefault(key, []).append(row["accuracy"])
        for (model, shots, task), values in found.items():
            yield {
                "of": of,
                "seed": seed,
                "model": model,
                "measure": f"{shots}-shot" if shots else "zero-shot",
                "task": task,
                "percent": round(np.mean(values), 3),
            }


def show_sweep(rows, path):
    """Print what was measured of both models, and the difference; draw it, with dots for seeds."""
    models, points = names_of(rows, "model"), names_of(rows, "of")
    study = path.stem.split("-")[0]
    (across,) = SWEEPS[study].get(points[0], [study])  # the setting that a sweep changes
    lines, panels = [{across: of} for of in points], {}
    ticks = [] if study in ("ablations", "replay") else [float(of) for of in points]
    for measure in names_of(rows, "measure"):
        cells, curves = [], []
        for color, model in zip(COLORS, models, strict=False):
            found = [select(rows, "percent", of=of, measure=measure, model=model) for of in points]
            cells.append(found)  # (points, tasks, seeds)
            x, y = ticks or points, np.mean(found, axis=1)
            line = "-" if ticks else "D"
            curves += [(model, x, y.mean(1), line, color), ("_seeds", x, y, ".", color)]
        panels[across, f"{measure}, %"] = curves
        for line, a, b in zip(lines, *cells, strict=True):
            line[measure] = f"{a.mean():.1f}, {b.mean():.1f}, {fs.signed(b - a)}"
    print(f"{', '.join(models)}, difference with its 95 % interval")
    print_table(lines)
    draw_panels(panels, path, ticks)


# ---- During training -----------------------------------------------------------------------------
PANELS = {  # title of y: columns
    "loss in nats": ["plain_loss", "context_loss"],
    "temperatures": ["tau_1", "tau_2"],
    "tau_ctx sqrt(d)": ["tau_ctx sqrt(d)"],
    "validation, % right": SHOTS,
}
OF_CONTEXT = "context_loss", "tau_2", "tau_ctx sqrt(d)"  # the base does not learn them


def measure_emergence(args):
    """The rows of the logs of both models' training."""
    for objective, seed in product(args.pair, range(args.seeds)):
        path = train(seed, objective=objective, **args.all)
        for row in read_rows(path.with_suffix(".csv")):
            row["tau_ctx sqrt(d)"] = float(row["tau_ctx"]) * DEFAULT.width**0.5
            numbers = {column: round(float(value), 3) for column, value in row.items()}
            yield {"model": objective, "seed": seed} | numbers


def show_emergence(rows, path):
    """Draw the logs, means over seeds."""
    panels, models = {}, names_of(rows, "model")
    means = {(m, c): select(rows, c, model=m).mean(1) for m in models for c in list(rows[0])[1:]}
    for up, columns in PANELS.items():
        panels["step", up] = curves = []
        for model, (i, column) in product(models, enumerate(columns)):
            style = "-" if model.endswith("xp") else "--"
            if style == "-" or column not in OF_CONTEXT:
                x, y = means[model, "step"], means[model, column]
                curves.append((f"{column}, {model}", x, y, style, COLORS[i]))
    draw_panels(panels, path)


# ---- What embeddings carry -----------------------------------------------------------------------
def draw_some(seed, kinds=100):
    """A batch of B training cards, of the first `kinds` characters: images (B, 1, 32, 32),
    characters (B,), digits (B, 3) of their numbers."""
    torch.manual_seed(seed)
    cards = get_cards()
    numbers = cc.draw_different(1000, DEFAULT, cards.device)
    characters = cc.integers(numbers, 0, kinds)
    images = cc.draw_cards(cards, cards.train[characters], numbers, "train")
    return images, characters, torch.stack([numbers // 100, numbers // 10 % 10, numbers % 10], 1)


def measure_variance(args):
    """Percent of the variance of embeddings X and of contextualised ones that the character, and
    the number, explain linearly. All attend with one tau_ctx, about what context learns."""
    images, characters, digits = map(torch.cat, zip(*map(draw_some, range(16)), strict=True))
    causes = {"character": characters, "number": digits}
    i = torch.arange(B).to(images.device)  # the rows of a batch
    for (of, pair), seed in product(get_pairs(args).items(), range(args.seeds)):
        for name, changes in pair.items():
            X = cc.embed_images(load(train(seed, **changes)), images)
            X_ctx = [cc.contextualize(i, part, part, 1 / 64) for part in X.split(B)]
            embeddings = {"X": X, "X_ctx": F.normalize(torch.cat(X_ctx))}
            for (cause, labels), (what, x) in product(causes.items(), embeddings.items()):
                x = x - x.mean(0)
                A = F.one_hot(labels).flatten(1).float()
                explained = A @ (torch.linalg.pinv(A) @ x)
                yield {
                    "of": of,
                    "seed": seed,
                    "model": name,
                    "measure": f"{cause} in {what}",
                    "percent": round((100 * explained.var() / x.var()).item(), 3),
                }


# ---- Pictures ------------------------------------------------------------------------------------
def draw_grid(cells, columns, path, scale=1):
    """Draw cells (image (1, S, S), title, color of a frame), row by row."""
    rows = len(cells) // columns
    figure = Figure((scale * columns, 1.2 * scale * rows), layout="constrained")
    for axis, (image, title, color) in zip(figure.subplots(rows, columns).flat, cells, strict=True):
        axis.imshow(image[0].numpy(force=True), cmap="gray", vmin=0, vmax=1)
        axis.set_title(title, fontsize=8)
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set(color=color, linewidth=3)
    figure.savefig(path, dpi=130)


def draw_attention(args, path):
    """Cards and the six that each attends to most: green the same character, orange the same digit
    in two places."""
    model = load(train(0, objective=args.context, **args.all))
    images, characters, digits = draw_some(1, len(get_cards().train))
    X, i = cc.embed_images(model, images), torch.arange(B).to(images.device)
    weights = 100 * cc.contextualize(i, X, torch.eye(B).to(X), model.scalars()[2])
    same = characters[:, None] == characters
    alike = (digits[:, None] == digits).sum(2) == 2
    same.fill_diagonal_(False)
    cells = []
    for query in same.any(1).nonzero()[:8, 0]:
        cells.append((images[query], "image", "black"))
        for j in weights[query].topk(6).indices:
            color = COLORS[2] if same[query, j] else "#E69F00" if alike[query, j] else "white"
            cells.append((images[j], f"{weights[query, j]:.1f} %", color))
    draw_grid(cells, 14, path)


def draw_cards(args, path):
    """18 training cards with their captions."""
    cards, cells = get_cards(), []
    torch.manual_seed(0)
    images, tokens = cards.draw_batch(replace(DEFAULT, batch_size=18))
    words = list(cards.vocabulary)
    for image, row in zip(images, tokens, strict=True):
        caption = " ".join(words[token] for token in row if token)
        cells.append((image, textwrap.fill(caption, 25), "white"))
    draw_grid(cells, 6, path, scale=1.9)


# ---- Speed ---------------------------------------------------------------------------------------
def collate(read, pairs):
    """[(what `read` makes an image of, tokens)] -> a batch."""
    return torch.utils.data.default_collate([(read(image), tokens) for image, tokens in pairs])


def load_plainly(data, settings):
    """The plain PyTorch way to draw a batch, for `cc.train`: workers, one per core, open and crop
    images."""
    paths, captions = zip(*cc.read_captions(Path(settings.data)), strict=True)
    tokens = cc.tokenize(captions, data.vocabulary)
    crop = transforms.RandomResizedCrop(settings.image_size, (0.5, 1))
    flip = transforms.RandomHorizontalFlip()
    read = transforms.Compose([datasets.folder.pil_loader, crop, flip, transforms.ToTensor()])
    loader = torch.utils.data.DataLoader(
        list(zip(paths, tokens, strict=True)),
        settings.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=os.cpu_count(),
        persistent_workers=True,
        collate_fn=partial(collate, read),
    )
    batches = chain.from_iterable(repeat(loader))
    return lambda _: [part.to(data.device) for part in next(batches)]


def measure_speed(args):
    """Images/s of training on captions of one's own at 64 pixels, ours and plain in float32."""
    settings = replace(DEFAULT, steps=400, data=args.data, image_size=64)
    data = cc.Photos(cc.choose_device(cpu=False), settings)
    for way in ("ours", "plain"):
        if way == "plain":
            data.draw_batch = load_plainly(data, settings)
            settings = replace(settings, float32=True)
        with tempfile.TemporaryDirectory() as folder:
            cc.train(settings, data, Path(folder))
            seconds = numbers_of(read_rows(Path(folder, "clixp.csv")), "seconds")
        # the first 200 steps warm up
        yield {"way": way, "images/s": round(200 * settings.batch_size / (seconds[1] - seconds[0]))}


# ---- The command line ----------------------------------------------------------------------------
STUDIES = {  # name, besides sweeps: what yields the rows of the CSV file, what shows them
    "emergence": (measure_emergence, show_emergence),
    "variance": (measure_variance, show_sweep),
    "speed": (measure_speed, print_table),
    "attention": (None, draw_attention),
    "cards": (None, draw_cards),
}


def run(args):
    """Measure, print and draw one study."""
    args.pair = cc.OBJECTIVES[args.sigmoid :: 2]  # clip, clixp; or siglip, siglixp
    args.base, args.context = args.pair
    args.all = {"steps": args.steps, "tau_max": args.tau_max}
    name = args.study + "-sigmoid" * args.sigmoid
    for setting, value in args.all.items():
        if value != getattr(DEFAULT, setting):
            name += f"-{setting}{value:g}"
    picture, table = FIGURES / f"{name}.png", FIGURES / f"{name}.csv"
    measure, show = STUDIES.get(args.study, (measure_sweep, show_sweep))
    if measure and not args.draw:
        cc.write_csv(table, list(measure(args)))
    show(read_rows(table) if measure else args, picture)


def main(arguments=None):
    parser = argparse.ArgumentParser("study", argparse.SUPPRESS, __doc__.splitlines()[0])
    add = parser.add_argument
    add("study", choices=list(SWEEPS | STUDIES))
    add("--seeds", type=int, default=3, choices=range(1, 11), help="of training (3)")
    add("--draw", action="store_true", help="only print and draw again, from the CSV file")
    add("--sigmoid", action="store_true", help="siglip and siglixp instead of clip and clixp")
    add("--steps", type=int, default=DEFAULT.steps, help="of all models")
    add("--tau-max", type=float, default=DEFAULT.tau_max, help="of all models")
    add("--data", help="captions, of speed")
    cc.report_errors(parser, run, arguments)


if __name__ == "__main__":
    main()
