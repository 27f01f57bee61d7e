"""The studies of the README: each one command, with a CSV file and a picture in figures/.

python figures/study.py ablations    the context loss with one part changed
python figures/study.py steps        or number_share, width: context against a setting
python figures/study.py post         a finished base, continued without and with context
python figures/study.py frontier     zero-shot against 16-shot in training; minutes.png: time
python figures/study.py emergence    losses, temperatures, attention, accuracy in training
python figures/study.py attention    which cards an image attends to
python figures/study.py variance     what embeddings carry: the character, the number
python figures/study.py cards        training cards with their captions
python figures/study.py real         images of --data DIR [DIR ...] as they are and with plates
python figures/study.py profile      where the time of a training step goes
python figures/study.py speed        against the plain PyTorch way, on cards or --data DIR
"""

import argparse
import csv
import os
import sys
import textwrap
import time
from dataclasses import replace
from functools import partial
from itertools import chain, product, repeat
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import contextclip as cc  # noqa: E402
import fewshot as fs  # noqa: E402

FIGURES, RUNS = Path(__file__).resolve().parent, Path("runs/study")
DEFAULT = cc.Settings("clixp")
OBJECTIVES = {"base": "clip", "context": "clixp"}
SHOTS = {"zero-shot": 0, "1-shot": 1, "4-shot": 4, "16-shot": 16}
COLORS = ["#D55E00", "#0072B2", "#009E73", "#555555"]


def read_rows(path):
    """The rows of a CSV file, each {column: text}."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def show_table(rows, path):
    cc.print_table(rows)


def write_rows(path, rows):
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
    """Of one batch: images, attention, which cards share a character, which others two digits."""
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
    path = RUNS / folder / ("-".join(changed) or "default") / f"seed{seed}/{settings.objective}.pt"
    cards, history = cc.Cards(cc.choose_device(), settings), path.with_suffix(".watched.csv")
    rows = {row["step"]: row for row in (read_rows(history) if history.exists() else [])}

    def watch(step, model):
        if step % 200 == 0 or step in (10, 50, 100):
            _, weights, same, _ = attend(model, cards, model.temperatures()[2])
            found = {"step": step, "attention": share(weights, same)} | cards.validate(model)
            rows[str(step)] = found  # a resumed run goes through some steps again
            write_rows(history, list(rows.values()))

    with cc.lock(path.parent):
        cc.train(settings, cards, path.parent, resume=True, init=init, watch=watch)
    return path, cards


# ---- Ablations and sweeps ------------------------------------------------------------------------
ABLATIONS = {  # name: changed settings
    "base": {"objective": "clip"}, "no self-mask": {"no_mask": True}, "alpha 0.6": {"alpha": 0.6},
    "shared temperature": {"shared_temperature": True}, "detached values": {"detach_values": True},
}  # fmt: skip


def sweep(name, values, **others):
    """{value: {model: changed settings}}, base and context for each value of a setting."""
    changes = {str(value): {name: value} | others for value in values}
    return {v: {"base": c | {"objective": "clip"}, "context": c} for v, c in changes.items()}


SWEEPS = {  # what is compared: two models that see the same images
    "ablations": {name: {"full": {}, "changed": changes} for name, changes in ABLATIONS.items()},
    "number_share": sweep("number_share", [0.0, 0.5, 0.9, 1.0]),
    "steps": sweep("steps", [400, 800, 1600, 3200]),
    "width": sweep("width", [32, 64, 128]),
    "post": sweep("steps", [25, 100, 400], lr=5e-4),
}


def measure_sweep(study, args):
    """Train and evaluate the models: rows of accuracies on the 21 tasks, the mean of the six
    classifiers and of two draws of images; zero-shot those of known words."""
    methods = ["zero-shot", *fs.SIX]
    for (of, changes), seed in product(SWEEPS[study].items(), range(args.seeds)):
        more, models = {}, {}
        if study == "post":
            base, _ = train(seed, objective="clip")
            more = {"folder": "post", "init": cc.read_checkpoint(base)}
        for model, change in changes.items():
            path, cards = train(seed, **more, **change)
            models[model] = cc.load(path, cards.device)
        tasks, validation = fs.card_tasks(cards), fs.validation_tasks(cards)
        draws = (2 * seed, 2 * seed + 1)
        chosen = fs.choose(models, validation, methods, [1, 4, 16], queries=16)
        rows = fs.evaluate(models, tasks, chosen, draws, 16, queries=16)
        for (model, method, k), values in fs.tabulate(rows, per_run=2).items():
            if method in ("zero-shot", fs.MEAN):
                row = {"of": of, "model": model, "seed": seed, "shots": k}
                for task, accuracy in enumerate(values.mean(1)):
                    yield row | {"task": task, "accuracy": round(accuracy, 3)}


def show_sweep(rows, path):
    """Print and draw accuracies of both models and their difference, for each value."""
    cells, names = {}, list(dict.fromkeys(row["model"] for row in rows))
    for row in rows:
        tasks = cells.setdefault(row["of"], {}).setdefault((row["shots"], row["model"]), {})
        tasks.setdefault(row["task"], []).append(float(row["accuracy"]))
    lines = [{path.stem: of} for of in cells]
    x, panel = [of.replace(" ", "\n") for of in cells], []
    for (shots, k), color in zip(SHOTS.items(), COLORS, strict=True):
        found = []
        for line, table in zip(lines, cells.values(), strict=True):
            first, second = (np.array(list(table[str(k), name].values())) for name in names)
            found.append(fs.interval(second - first))
            means = f"{first.mean():.1f}, {second.mean():.1f}"
            line[f"{shots}: {', '.join(names)}"] = f"{means}, {fs.signed(second - first)}"
        panel.append((shots, x, *np.nan_to_num(found).T, "s-", color))
    cc.print_table(lines)
    draw_panels({(path.stem, f"{names[1]} - {names[0]}, points of accuracy"): panel}, path)


# ---- During training -----------------------------------------------------------------------------
TAUS = {"3.0": ":", "5.0": "-"}
PANELS = {
    "loss in nats": ["plain_loss", "context_loss"],
    "temperatures": ["tau_1", "tau_2"],
    "tau_ctx sqrt(d)": ["tau_ctx sqrt(d)"],
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
    for (tau, style), (i, model) in product(TAUS.items(), enumerate(OBJECTIVES)):
        points = curves(rows, ["step", "zero-shot", "16-shot"], model, tau)
        for name, place in (("best 16-shot", points[2].argmax()), ("end", -1)):
            step, *accuracies = points[:, place]
            line = {"start of tau": tau, "model": model, "point": name, "step": f"{step:.0f}"}
            lines.append(line | {"zero-shot": accuracies[0], "16-shot": accuracies[1]})
        paths.append((f"{model}, tau from {tau}", *points[1:], None, style, COLORS[i]))
        paths.append((None, *accuracies, None, "o", COLORS[i]))
    cc.print_table(lines)
    draw_panels({("zero-shot, %", "16-shot, %"): paths}, path)
    minutes = {("seconds of training", f"{name}, %"): [] for name in ("zero-shot", "16-shot")}
    ways = {"": rows, ", encoders before": read_rows(path.with_name("minutes_before.csv"))}
    for (label, found), (i, model) in product(ways.items(), enumerate(OBJECTIVES)):
        seconds, *points = curves(found, ["seconds", "zero-shot", "16-shot"], model)
        for panel, values in zip(minutes.values(), points, strict=True):
            panel.append((model + label, seconds, values, None, ":" if label else "-", COLORS[i]))
    draw_panels(minutes, path.with_name("minutes.png"))


def show_emergence(rows, path):
    """Draw losses, temperatures, attention and accuracies over training steps."""
    panels = {}
    for title, columns in PANELS.items():
        panels["step", title] = lines = []
        for (i, column), model in product(enumerate(columns), OBJECTIVES):
            line = "-" if model == "context" else "--"
            steps, values = curves(rows, ["step", column], model)
            lines.append((f"{column}, {model}", steps, values, None, line, COLORS[i]))
    draw_panels(panels, path)


def measure_variance(args):
    """Percent of the embeddings' variance that character, and number, explain linearly."""
    for seed, objective in product(range(args.seeds), cc.OBJECTIVES):
        path, cards = train(seed, objective=objective)
        torch.manual_seed(1)
        characters = torch.arange(100, device=cards.device).repeat(80)
        images, numbers = cc.draw_cards(cards, cards.train[characters], "train")
        model = cc.load(path, cards.device)
        x = cc.embed_images(model, images)
        x = (x - x.mean(0)).cpu()
        row = {"objective": objective, "seed": f"{seed}"}
        for name, causes in (("character", characters[:, None]), ("number", numbers)):
            A = F.one_hot(causes).flatten(1).float().cpu()
            fitted = A @ torch.linalg.lstsq(A, x).solution
            row[name] = f"{100 * fitted.square().sum() / x.square().sum():.1f}"
        yield row


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


def draw_attention(args, path):
    """Cards and the six each attends to most, at the context model's tau_ctx: green the same
    character, orange two digits in common; print the shares."""
    rows, cells = [], [[] for _ in range(5)]
    for name in ("context", "base"):
        trained, cards = train(0, objective=OBJECTIVES[name])
        model = cc.load(trained, cards.device)
        if name == "context":
            tau_ctx = model.temperatures()[2]
        images, weights, same, digits = attend(model, cards, tau_ctx)
        for kind, there in (("the same character", same), ("two digits in common", digits)):
            rows.append({"model": name, "attention to": kind, "%": share(weights, there)})
        for row, query in zip(cells, same.any(1).nonzero()[:, 0].tolist(), strict=False):
            row.append((images[query], name, "black"))
            for i in weights[query].topk(6).indices.tolist():
                color = COLORS[2] if same[query, i] else "#E69F00" if digits[query, i] else "white"
                row.append((images[i], f"{100 * weights[query, i]:.1f} %", color))
    cc.print_table(rows)
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
    for source in args.data or ["MNIST"]:
        dataset = fs.open_dataset(source, Path("runs/data"))
        places = np.linspace(0, len(dataset) - 1, 6).astype(int).tolist()
        images = torch.stack([fit(dataset[i][0]) for i in places])
        images = [*images, *fs.with_plates(images, cards)]
        cells.append([(image, Path(source).name, "white") for image in images])
    draw_grid(cells, (1, 1.2), path)


# ---- Time and memory -----------------------------------------------------------------------------
def by_turns(parts, rounds, rest=0):
    """{name: median seconds} of functions called by turns, `rest` apart, once before to warm up."""
    found = {name: [] for name in parts}
    for _, (name, part) in product(range(rounds + 1), parts.items()):
        time.sleep(rest)
        start = time.perf_counter()
        part()
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        found[name].append(time.perf_counter() - start)
    return {name: np.median(seconds[1:]) for name, seconds in found.items()}


def measure_profile(args):
    """A row per part of a training step; encoders and loss are forward and backward."""
    cards = cc.Cards(cc.choose_device(), DEFAULT)
    batches = iter(partial(cards.draw_batch, DEFAULT, 0), None)
    model, _, optimizer = cc.start(DEFAULT, cards, None, None, False)
    images, tokens = next(batches)
    v, t = model.encode_image(images), model.encode_text(tokens)
    v, t = v.detach().requires_grad_(), t.detach().requires_grad_()

    def step():
        model(*next(batches))[0].backward()
        optimizer.step()

    parts = {
        "full step": step,
        "image encoder": lambda: model.encode_image(images).sum().backward(),
        "text encoder": lambda: model.encode_text(tokens).sum().backward(),
        "cards": lambda: next(batches),
        "loss": lambda: cc.lixp_loss(v, t, model.temperatures(), DEFAULT)[0].backward(),
    }
    seconds = by_turns(parts, 20)
    seconds["both encoders"] = seconds["image encoder"] + seconds["text encoder"]
    for name, median in seconds.items():
        percent = f"{100 * median / seconds['full step']:.0f}"
        yield {"part": name, "ms": f"{1000 * median:.1f}", "%": percent}


def draw_plainly(cards, character):
    """A training card (1, 32, 32) by Pillow, as `draw_cards` draws it; nothing is bent."""
    face = torch.multinomial(cards.drawn[character, cc.FACE_SPLITS["train"]].float(), 1)
    image = Image.fromarray(cards.glyphs[character, face][0].numpy())
    image = transforms.RandomAffine(9, (0.16, 0.16), (0.8, 1.6), 11, Image.BILINEAR)(image)
    left, top = int(torch.randint(9, ())), int(torch.randint(4, ()) + 20 * torch.randint(2, ()))
    for place, digit in enumerate(torch.randint(10, (3,))):
        image.paste(Image.fromarray(cards.digits[digit, face][0].numpy()), (left + 8 * place, top))
    shades = [0.3 * torch.rand(()), 0.6 + 0.4 * torch.rand(())]
    paper, pen = (shades[i] for i in torch.randperm(2))
    card = torch.lerp(paper, pen, transforms.functional.to_tensor(image))
    return card + 0.04 * torch.rand(1, 32, 32) - 0.02


def collate(pairs, fit):
    return torch.stack([fit(image) for image, _ in pairs]), torch.stack([t for _, t in pairs])


def load_plainly(data, source, batch_size):
    """The plain PyTorch way: workers, one per core, open and crop images, or draw cards."""
    if source:
        captions, paths, _ = cc.read_captions(Path(source))
        images, tokens = [paths[name] for name in captions], data.tokens[:, 0]
        crop = transforms.RandomResizedCrop(64, (0.5, 1))
        steps = [cc.open_image, crop, transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    else:
        images = data.train.repeat(100).tolist()
        tokens, steps = data.tokens[images], [partial(draw_plainly, data)]
    options = {"shuffle": True, "drop_last": True, "persistent_workers": True}
    collated = partial(collate, fit=transforms.Compose(steps))
    options |= {"num_workers": os.cpu_count(), "collate_fn": collated}
    pairs = list(zip(images, tokens.cpu(), strict=True))
    return torch.utils.data.DataLoader(pairs, batch_size, **options)


def make_steps(started, batches):
    """60 training steps on what `batches` yields next."""
    model, _, optimizer = started
    for _ in range(60):
        loss, *_ = model(*(part.to(model.b.device) for part in next(batches)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def measure_speed(args):
    """Images/s of training, ours and plain in float32; on cards, or on --data at 64 pixels."""
    device, source = cc.choose_device(), args.data and args.data[0]
    settings = replace(DEFAULT, data=source, image_size=64) if source else DEFAULT
    data = cc.Photos(device, settings) if source else cc.Cards(device, settings)
    loader = load_plainly(data, source, settings.batch_size)
    plain, ours = chain.from_iterable(repeat(loader)), partial(data.draw_batch, settings, 0)
    start = partial(cc.start, data=data, init=None, saved=None, compile=False)
    parts = {
        "plain": partial(make_steps, start(replace(settings, precision="float32")), plain),
        "ours": partial(make_steps, start(settings), iter(ours, None)),
    }
    for way, seconds in by_turns(parts, 3, rest=3).items():
        yield {"way": way, "images/s": f"{60 * settings.batch_size / seconds:.0f}"}


# ---- The command line ----------------------------------------------------------------------------
PICTURES = {"attention": draw_attention, "cards": draw_cards, "real": draw_real}
STUDIES = {study: (partial(measure_sweep, study), show_sweep) for study in SWEEPS}
STUDIES["frontier"] = (partial(measure_history, TAUS), show_frontier)
STUDIES["emergence"] = (partial(measure_history, [str(DEFAULT.tau)]), show_emergence)
TABLES = {"variance": measure_variance, "profile": measure_profile, "speed": measure_speed}
STUDIES |= {study: (measure, show_table) for study, measure in TABLES.items()}


@cc.errors_in_one_line("study")
def main(arguments=None):
    """Measure, draw and print one study."""
    parser = argparse.ArgumentParser("study", argparse.SUPPRESS, __doc__.splitlines()[0])
    parser.add_argument("study", choices=[*STUDIES, *PICTURES])
    parser.add_argument("--seeds", type=int, default=3, choices=range(1, 11), metavar="N")
    parser.add_argument("--draw", action="store_true", help="only draw, from the CSV file")
    parser.add_argument("--data", nargs="+", help="of real: folders of images; of speed: captions")
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
