"""Few-shot classification with the models of contextclip.py: 21 tasks, accuracy against shots.

    python fewshot.py                                          compare the models in runs/
    python fewshot.py --data DIR --template "a photo of a {}"  on your images, a folder per class
    python fewshot.py --data MNIST --template "digit {}"       on a dataset of torchvision

An episode is a few labelled images per class, the support, and queries to classify. For embeddings
of any other model: `accuracy("prototypes", Episode(x, y, X, Y, T, tau))`.
1 classifiers, 2 tasks, 3 evaluation, 4 results, 5 the command line.
"""

import argparse
import io
import itertools
import re
import zlib
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from torchvision import datasets
from tqdm import tqdm

import contextclip as cc
from contextclip import UserError

# ---- 1. Classifiers ------------------------------------------------------------------------------
# One signature: the queries x (Q, d); a support of a few images per class, X (S, d), with one-hot
# labels Y (S, C); the classes' texts T (C, d), all of length 1; scale, how far to trust the texts
# (`text_scale`); then hyper-parameters. Returns scores (Q, C), of which the highest wins.


def zero_shot(x, X, Y, T, scale):
    """x T^t (Radford et al. 2021)."""
    return x @ T.T


def prototypes(x, X, Y, T, scale):
    """x P^t, P (C, d) the class means of X, normalised again (Snell et al. 2017)."""
    return x @ F.normalize(Y.T @ X).T


def tip_adapter(x, X, Y, T, scale, a, b):
    """scale x T^t + a exp(-b (1 - x X^t)) Y (Zhang et al. 2022, with scale for their 100)."""
    near = (b * (x @ X.T - 1)).exp()
    return scale * x @ T.T + a * near @ Y


def tip_x(x, X, Y, T, scale, a, b, g):
    """Tip-Adapter + g R(-KL(p_x || p_X)) Y with p = softmax(. T^t / 0.1); R stretches a query's
    row into the range of its cosines x X^t (Udandarao et al. 2023)."""
    log_p_x = F.log_softmax(x @ T.T / 0.1, 1)
    log_p_X = F.log_softmax(X @ T.T / 0.1, 1)
    affinity = log_p_x.exp() @ log_p_X.T  # -KL up to a constant of the row, which R removes
    low, high = affinity.aminmax(dim=1, keepdim=True)
    start, end = (x @ X.T).aminmax(dim=1, keepdim=True)
    affinity = start + (affinity - low) / (high - low).clamp_min(1e-6) * (end - start)
    return tip_adapter(x, X, Y, T, scale, a, b) + g * affinity @ Y


def vote(x, X, Y, T, scale, k, weight):
    """The k nearest support images vote for their classes. Weights: "plurality" 1 each, and a
    little for nearness, 1 / 2 in all, so that of equal counts the nearer win; "softmax"
    exp(cos / 0.07) (Wu et al. 2018); "rank" 1 / (2 + rank), the first has rank 0."""
    k = min(k, len(X))
    cosines, nearest = (x @ X.T).topk(k)
    ranks = torch.arange(k).to(x).expand_as(cosines)
    weights = {
        "plurality": 1 + (k - ranks) / (k * (k + 1)),
        "softmax": (cosines / 0.07).exp(),
        "rank": 1 / (2 + ranks),
    }[weight]
    votes = torch.zeros(len(x), len(T)).to(x)
    return votes.scatter_add(1, Y.argmax(1)[nearest], weights)


def gda(x, X, Y, T, scale, shrink, trust=0.0):
    """Gaussian discriminant analysis: x S^-1 M_c - M_c S^-1 M_c / 2 + trust scale x T^t, M the
    class means, S the covariance within classes, shrunk towards the identity (Wang et al. 2024)."""
    M = Y.T @ X / Y.sum(0)[:, None]
    rest = X - Y @ M
    S = rest.T @ rest / len(X)
    mean = S.trace() / len(S)
    if mean < 1e-9:  # one shot, S = 0: with the identity these are the prototypes
        mean = 1.0
    S = (1 - shrink) * S + shrink * mean * torch.eye(len(S)).to(S)
    W = torch.linalg.solve(S, M.T)  # (d, C)
    return x @ W - (M.T * W).sum(0) / 2 + trust * scale * x @ T.T


@torch.enable_grad()
def linear_probe(x, X, Y, T, scale, l2):
    """x W^t + c of the least mean cross-entropy of the support + l2 |W|^2 / 2."""
    W = torch.zeros_like(T, requires_grad=True)
    c = torch.zeros_like(T[:, 0], requires_grad=True)
    optimizer = torch.optim.LBFGS([W, c], max_iter=40, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = F.cross_entropy(X @ W.T + c, Y.argmax(1)) + l2 / 2 * W.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return (x @ W.T + c).detach()


@torch.enable_grad()
def tip_adapter_f(x, X, Y, T, scale, a, b, lr, steps=20):
    """Tip-Adapter whose keys, at first X, are trained: AdamW lowers the cross-entropy of support
    images, at most 128 a step, each classified by the others' keys and the text."""
    keys = X.clone().requires_grad_()
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW([keys], lr, eps=1e-4)
    for _ in range(steps):
        rows = torch.randperm(len(X), generator=generator)[:128].to(X.device)
        x_s, y_s = X[rows], Y[rows]
        cosines = (x_s * keys[rows]).sum(1, keepdim=True)
        own = a * (b * (cosines - 1)).exp() * y_s
        loss = F.cross_entropy(tip_adapter(x_s, keys, Y, T, scale, a, b) - own, y_s)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return tip_adapter(x, keys, Y, T, scale, a, b).detach()


SHRINK = [0.01, 0.03, 0.1, 0.3, 0.9]
CLASSIFIERS = {  # name: function, the hyper-parameters to choose from
    "zero-shot": (zero_shot, {}),
    "prototypes": (prototypes, {}),
    "Tip-Adapter": (tip_adapter, {"a": [10, 30, 100], "b": [2, 8]}),
    "Tip-X": (tip_x, {"a": [30], "b": [2, 8], "g": [3, 10, 30]}),
    "plurality vote": (vote, {"weight": ["plurality"], "k": [1, 2, 4, 8, 16, 32]}),
    "softmax vote": (vote, {"weight": ["softmax"], "k": [1, 4, 8, 16, 32, 64]}),
    "rank vote": (vote, {"weight": ["rank"], "k": [1, 4, 8, 16, 32, 64]}),
    "GDA": (gda, {"shrink": SHRINK}),
    "GDA + text": (gda, {"shrink": SHRINK, "trust": [0.5, 2]}),
    "linear probe": (linear_probe, {"l2": [1e-5, 1e-4, 1e-3]}),
    "Tip-Adapter-F": (tip_adapter_f, {"a": [30], "b": [8], "lr": [1e-3, 3e-3, 1e-2]}),
}
TRAINING_FREE, RIVALS = list(CLASSIFIERS)[1:7], list(CLASSIFIERS)[7:]  # the paper's six; others
MEAN = "mean of the six"


def text_scale(X, Y, T, tau):
    """How far to trust the text: the scale s, a share of the model's tau, at which softmax(s X T^t)
    gives the support its labels with the highest likelihood; 0 where captions say nothing."""
    scales = tau * torch.tensor([0, 1, 2, 4, 8, 16, 32, 64]).to(X) / 64
    logits = scales[:, None, None] * (X @ T.T)  # (scales, S, C)
    likelihood = (logits.log_softmax(2) * Y).sum(2).mean(1)
    return scales[likelihood.argmax()]


# ---- 2. Tasks ------------------------------------------------------------------------------------
TASKS = {  # name: group and pattern of how "é latin small letter e with acute" begins
    "digits": "seen . digit",
    "Latin capitals": "seen [A-Z]",
    "Latin small letters": "seen [a-z]",
    "Greek": "seen . greek",
    "arrows": "seen [\u2190-\u21cf]",
    "operators": "seen [\u2200-\u223f]",
    "capitals + diacritic": "combined . latin capital letter [a-z] with ",
    "small + diacritic": "combined . latin small letter [a-z] with ",
    "Cyrillic": "unseen [\u0410-\u044f]",
    "Armenian": "unseen . armenian",
    "Georgian": "unseen . georgian",
    "Hebrew": "unseen [\u05d0-\u05ea]",
    "Arabic": "unseen [\u0600-\u06ff] arabic letter",
    "Lao": "unseen . lao",
    "Lisu": "unseen . lisu",
    "Canadian syllabics": "unseen . canadian",
    "Braille": "unseen . braille",
    "box drawing": "unseen . box drawings",
    "playing cards": "unseen . playing card",
    "dominoes": "unseen . domino tile",
    "hexagrams": "unseen . hexagram",
}
# seen: characters trained, in typefaces (STIX) that never were; combined: a letter and a diacritic
# never together; unseen: scripts never trained, nor their words, in DejaVu, for STIX lacks them
TYPEFACES = {"seen": "test", "combined": "test", "unseen": "train", "validation": "validation"}


class CardTask:
    """Cards of C characters, `members` their rows in `cards`; captions: a list for each class."""

    def __init__(self, cards, name, members, group):
        self.cards, self.name, self.group, self.members = cards, name, group, members
        self.captions = [[cards.names[i]] for i in members]

    def draw(self, seed, shots, queries):
        """Images ((queries + shots) C, 1, 32, 32), row r of class r % C: the queries, the same for
        any number of shots; then the support, of which fewer shots are the first of more."""
        images = []
        for i, count in enumerate([queries] + [1] * shots):  # the queries, then shot by shot
            torch.manual_seed(zlib.crc32(f"{self.name} {seed} {i}".encode()))
            rows = torch.tensor(self.members * count, device=self.cards.device)
            numbers = cc.integers(rows, 0, 1000)
            images.append(cc.draw_cards(self.cards, rows, numbers, TYPEFACES[self.group]))
        return torch.cat(images)


def card_tasks(cards, names=TASKS):
    """The built-in tasks, of 40 characters at most."""
    tasks = []
    for name in names:
        group, pattern = TASKS[name].split(" ", 1)
        rows = cards.rows_of("train" if group == "seen" else "test", TYPEFACES[group])
        rows = [i for i in rows if re.match(pattern, f"{cards.characters[i]} {cards.names[i]}")]
        rows.sort(key=lambda i: zlib.crc32(cards.names[i].encode()))  # by chance
        tasks.append(CardTask(cards, name, sorted(rows[:40]), group))
    return tasks


def validation_tasks(cards):
    """Tasks to choose hyper-parameters on, of characters that neither train nor test."""
    return [CardTask(cards, f"{rows[0]}", rows[:40], "validation") for rows in cards.validation]


class OwnTask:
    """Images of your own: images (N, 1 or 3, S, S), labels (N,) of C classes; captions: a list for
    each class. `part` of each class's images is used."""

    def __init__(self, name, group, images, labels, captions, part=slice(None)):
        self.name, self.group, self.images, self.captions = name, group, images, captions
        self.members = [np.flatnonzero(labels == c)[part] for c in range(len(captions))]

    def draw(self, seed, shots, queries):
        """As `CardTask.draw`: the first images of a permutation of each class. Raises UserError."""
        chosen = []
        for c, rows in enumerate(self.members):
            if len(rows) < queries + shots:
                raise UserError(
                    f"--data {self.name}: {self.captions[c][0]!r} has {len(rows)} images (per half "
                    f"with models of your captions), {queries} + {shots} are needed"
                )
            order = np.random.default_rng([seed, c]).permutation(rows)
            chosen.append(order[: queries + shots])
        return self.images[np.stack(chosen, 1).ravel()] / 255


def read_class_folders(source, fit):
    """Images (N, C, S, S) uint8, labels (N,) and class names of a folder that holds a folder of
    images for each class. What is hidden or no image is passed over. Raises UserError, OSError."""
    images, labels, folders = [], [], sorted(source.glob("[!.]*/"))
    for label, folder in enumerate(folders):
        for path in sorted(folder.glob("[!.]*")):
            if cc.is_image(path) and path.is_file():
                labels.append(label)
                try:
                    images.append(cc.to_bytes(fit(Image.open(path))))
                except Exception as error:
                    raise UserError(f"{path}: {error}") from error
        if label not in labels:
            raise UserError(f"{folder} holds no images: name the folder of the class folders")
    if len(folders) < 2:
        raise UserError(f"--data {source}: name the folder that holds the class folders")
    return torch.stack(images), np.array(labels), [folder.name for folder in folders]


def read_dataset(name, fit):
    """The same of a dataset of torchvision, its test part. Raises UserError."""
    try:
        data = getattr(datasets, name)("runs/data", train=False, transform=fit, download=True)
        images = torch.stack([cc.to_bytes(image) for image, _ in data])
        return images, np.array(data.targets), data.classes
    except Exception as error:
        raise UserError(f"--data {name}: {error}") from error


def read_task(source, args, model):
    """The arguments of an OwnTask from what --data names. Raises UserError, OSError."""
    fit = cc.preprocess(model.settings)
    if source and Path(source).is_dir():
        images, labels, names = read_class_folders(Path(source), fit)
    elif hasattr(datasets, source):
        images, labels, names = read_dataset(source, fit)
    else:
        raise UserError(f"--data {source!r}: no such folder, nor a dataset of torchvision")

    captions = [[text.replace("{}", spoken(name)) for text in args.template] for name in names]
    return source, find_group(source, captions, model), images, labels, captions


def spoken(name):
    """How captions say a class's name: 7, hot_dog and "0 - zero" (MNIST) are "seven", "hot dog" and
    "zero"."""
    name = re.sub(r"^\d - ", "", name).replace("_", " ")
    return cc.NUMERALS[int(name)] if name in {*"0123456789"} else name


def find_group(source, captions, model):
    """ "own", or "unnamed" where the model cannot tell the captions of two classes apart, and so
    zero-shot accuracy would mean nothing. Says so, and if a class has unknown words."""
    tokens = [cc.tokenize(texts, model.vocabulary).tolist() for texts in captions]
    unknown = sum(1 in row for rows in tokens for row in rows)
    print(f"{source}: {len(tokens)} classes, {unknown} of their captions have unknown words")
    if len(set(map(str, tokens))) == len(tokens):
        return "own"
    print(f"{source}: to the models some classes have the same caption: no zero-shot")
    return "unnamed"


def with_plates(images, cards):
    """images (N, 1, S, S) uint8 -> (N, 1, 32, 32), a number plate in its own shades over each."""
    torch.manual_seed(0)
    images = F.interpolate(images.to(cards.device) / 255, cc.SIZE, mode="area")
    pixels = images.flatten(1)
    background = pixels.median(1, keepdim=True).values
    ink = pixels.gather(1, (pixels - background).abs().argmax(1, keepdim=True))  # farthest from it
    numbers = cc.integers(images, 0, 1000)
    cc.lay_plates(images, cards, numbers, "test", background[..., None], ink[..., None])
    return cc.to_bytes(images)


# ---- 3. Evaluation -------------------------------------------------------------------------------
class Episode(NamedTuple):
    """What a classifier is tried on: embeddings of length 1, in any order, with their labels."""

    x: torch.Tensor  # queries (Q, d)
    y: torch.Tensor  # their classes (Q,), from 0 to C - 1
    X: torch.Tensor  # support (S, d)
    Y: torch.Tensor  # their classes (S,)
    T: torch.Tensor  # the classes' texts (C, d)
    tau: float  # of the model (CLIP's logit scale), see `text_scale`

    def with_shots(self, shots):
        """The same with the first `shots` support images of each class; 0: all of them."""
        counts = F.one_hot(self.Y).cumsum(0)  # (S, C), of each class so far
        nth = counts.gather(1, self.Y[:, None])[:, 0]
        chosen = nth <= (shots or len(self.Y))
        return self._replace(X=self.X[chosen], Y=self.Y[chosen])

    def check(self):
        """Raises UserError if the parts do not fit together."""
        for rows, labels in ((self.x, self.y), (self.X, self.Y), (self.T, self.Y.unique())):
            known = set(labels.tolist()) <= set(range(len(self.T)))
            normal = ((rows.norm(dim=1) - 1).abs() < 0.01).all()
            if not (known and normal and len(rows) == len(labels)):
                raise UserError(
                    "embeddings have length 1 (torch.nn.functional.normalize), each with a label "
                    f"from 0 to {len(self.T) - 1}, and each class has support images"
                )


def episodes(models, tasks, seeds, shots, queries):
    """Yields (model's name, task, seed, Episode), each task drawn once for all models."""
    for task in tqdm(tasks, disable=None):
        for seed in seeds:
            images = task.draw(seed, shots, queries)
            for name, model in models.items():
                T = cc.embed_classes(model, task.captions)
                x = cc.embed_images(model, images.to(T.device))
                y = torch.arange(len(T), device=T.device).repeat(queries + shots)
                n = queries * len(T)
                tau = model.loss.scalars()["tau_1"].item()
                yield name, task, seed, Episode(x[:n], y[:n], x[n:], y[n:], T, tau)


def accuracy(method, episode, **hyper):
    """Percent of the queries that a classifier of CLASSIFIERS gets right. Raises UserError if the
    episode is not one."""
    episode.check()
    x, y, X, labels, T, tau = episode
    x, X, T = x.float(), X.float(), T.float()
    Y = F.one_hot(labels.long(), len(T)).to(X)
    scores = CLASSIFIERS[method][0](x, X, Y, T, text_scale(X, Y, T, tau), **hyper)
    return cc.percent_right(scores, y)


def choose(models, validation, methods, shots, queries):
    """Yields (method, shots, hyper-parameters), those best on the validation tasks, of equal ones
    the first. One choice for all models: else its noise would pass for a gain."""
    embedded = [e for *_, e in episodes(models, validation, range(2), max(shots), queries)]
    for method in methods:
        grid = CLASSIFIERS[method][1]
        values = itertools.product(*grid.values())
        points = [dict(zip(grid, v, strict=True)) for v in values]
        for k in [0] if method == "zero-shot" else shots:
            parts = [e.with_shots(k) for e in embedded]
            means = [np.mean([accuracy(method, e, **point) for e in parts]) for point in points]
            yield method, k, points[np.argmax(means)]


def evaluate(models, tasks, chosen, seeds, shots, queries):
    """Yields accuracies in percent of one training run's models, a dictionary each; zero-shot has 0
    shots."""
    for model, task, seed, episode in episodes(models, tasks, seeds, shots, queries):
        with_shots = cache(episode.with_shots)  # many classifiers, few numbers of shots
        for method, k, hyper in chosen:
            # no zero-shot where words are unknown, or captions of classes equal
            if k or task.group not in ("unseen", "unnamed"):
                yield {
                    "model": model,
                    "task": task.name,
                    "group": task.group,
                    "method": method,
                    "shots": k,
                    "hyper": hyper,
                    "seed": seed,
                    "accuracy": accuracy(method, with_shots(k), **hyper),
                }


# ---- 4. Results ----------------------------------------------------------------------------------
def tabulate(rows, shots, runs, draws):
    """{model: {(method, shots): accuracies (tasks, runs)}}; of one run (tasks, draws of images)."""
    table = {}
    for row in rows:  # run by run, task by task, draw by draw
        cells = table.setdefault(row["model"], {})
        cells.setdefault((row["method"], row["shots"]), []).append(row["accuracy"])
    for cells in table.values():
        for key, values in cells.items():
            values = np.reshape(values, (runs, -1, draws))
            cells[key] = values.mean(2).T if runs > 1 else values[0]
        for k in shots:
            cells[MEAN, k] = np.mean([cells[method, k] for method in TRAINING_FREE], axis=0)
    return table


def interval(values):
    """values (tasks, runs), both drawn by chance -> their mean and the half-width of its 95 %
    interval: Student's of the tasks' means and of the runs', the root of the sum of squares. Beyond
    ten degrees of freedom it takes that of ten, and is up to a seventh too wide."""
    student = [0, 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23]  # by freedom
    square = 0.0
    for means in (values.mean(1), values.mean(0)):
        dof = len(means) - 1
        if dof:
            square += student[min(dof, 10)] ** 2 * means.var(ddof=1) / len(means)
    return values.mean(), square**0.5


def signed(values):
    """ "+5.9 ± 1.7": the mean with its interval, neither of them smaller than what is printed."""
    mean, width = interval(values)
    text = f"{mean:+.1f}" if abs(mean) >= 0.05 else "0.0"
    return f"{text} ± {max(width, 0.05):.1f}" if width else text


def efficiency(base, context, shots):
    """{shots: how many times as many the baseline needs for the accuracy of the context model},
    read off its curve over log2 shots; ">2" where it needs more than the most that were tried,
    "<0.5" where it has that accuracy with the fewest. Of an accuracy the first number of shots that
    reaches it counts: where more shots bring context nothing, there is none."""
    best, first = np.unique(np.maximum.accumulate(base), return_index=True)
    _, better = np.unique(np.maximum.accumulate(context), return_index=True)
    times = {}
    for i in better:
        needed = 2 ** np.interp(context[i], best, np.log2(shots)[first])
        sign = ">" if context[i] > best[-1] else "<" if context[i] < best[0] else ""
        times[shots[i]] = f"{sign}{needed / shots[i]:.2g}"
    return times


def print_table(title, cells, show, shots):
    """A line per method and a column per number of shots, of cells {(method, shots): values}."""
    print(f"\n{title:15}", *(f"{k:>7}-shot" for k in shots))
    for method in dict.fromkeys(method for method, k in cells if k):
        print(f"{method:15}", *(f"{show(cells[method, k]):>12}" for k in shots))
    found = cells.get(("zero-shot", 0))
    if found is not None:
        print(f"zero-shot, {len(found)} tasks: {show(found)}")


def compare(table):
    """{"clixp - clip": what context adds to its baseline, as accuracies} of each pair."""
    return {
        f"{context} - {base}": {k: table[context][k] - cells for k, cells in table[base].items()}
        for base, context in (("clip", "clixp"), ("siglip", "siglixp"))
        if {base, context} <= table.keys()
    }


def report(table, shots):
    """Print the accuracy of each model, and what context adds to its baseline."""
    for model, cells in table.items():
        print_table(model, cells, lambda values: f"{values.mean():.1f}", shots)
    for pair, gains in compare(table).items():
        print_table(pair, gains, signed, shots)
        means = [gains[MEAN, k].mean(1) for k in shots]  # of each task
        print(f"tasks that gain, of {len(means[0])}:", *(f"{(m > 0).sum()}" for m in means))
        context, base = ([table[m][MEAN, k].mean() for k in shots] for m in pair.split(" - "))
        times = efficiency(base, context, shots)
        print("sample efficiency:", *(f" {k}-shot {times[k]}" for k in times))


def draw_curves(table, shots, path):
    """Draw accuracy against shots, and what context adds, means of the six with 95 % intervals."""
    figure = Figure((9, 4), layout="constrained")
    panels = {f"accuracy (%), {MEAN}": table, "what context adds (points)": compare(table)}
    for axis, title in zip(figure.subplots(1, 2), panels, strict=True):
        for name, cells in panels[title].items():
            # a difference, a context model, a baseline
            color = "#009E73" if "-" in name else "#D55E00" if "xp" in name else "#0072B2"
            means, widths = np.transpose([interval(cells[MEAN, k]) for k in shots])
            axis.plot(shots, means, "o--" if "sig" in name else "o-", color=color, label=name)
            axis.fill_between(shots, means - widths, means + widths, color=color, alpha=0.15)
            axis.legend()
        axis.set(title=title, xlabel="labelled images per class")
        axis.set_xscale("log", base=2)
        axis.set_xticks(shots, shots)
        axis.grid()
    picture = io.BytesIO()
    figure.savefig(picture)
    cc.write_whole(path, picture.getvalue())


# ---- 5. The command line -------------------------------------------------------------------------
def load_runs(paths, device):
    """[{objective: model}], one per folder, that is, per training run. Raises UserError."""
    runs = {}
    for path in paths:
        model = cc.load(path, device)
        run = runs.setdefault(path.parent, {})
        objective = model.settings.objective
        if objective in run:
            raise UserError(f"{path.parent} has two models of {objective}")
        run[objective] = model
    kinds = {(*sorted(run), *m.vocabulary) for run in runs.values() for m in run.values()}
    if len(kinds) > 1:
        raise UserError("these folders hold different objectives, or models of other captions")
    return [*runs.values()]


def make_tasks(args, model, device):
    """(tasks, those on which hyper-parameters are chosen). Raises UserError, OSError."""
    own = [read_task(source, args, model) for source in args.data]
    if args.plate and not (own and model.settings.is_cards):
        raise UserError("--plate is laid over the images of --data, for models of cards")
    if not model.settings.is_cards:  # hyper-parameters: on half of the images of each class
        return [[OwnTask(*images, slice(i, None, 2)) for images in own] for i in (0, 1)]
    cards = cc.Cards(device)
    tasks = [OwnTask(*images) for images in own] or card_tasks(cards, args.tasks)
    for task in tasks if args.plate else []:
        task.images = with_plates(task.images, cards)
    return tasks, validation_tasks(cards)


def run(args):
    shots = sorted(set(args.shots))
    methods = dict.fromkeys(["zero-shot", *TRAINING_FREE, *args.methods])
    whole = all("{}" in text for text in args.template)
    if min(*shots, args.seeds, args.queries) < 1 or not whole:
        raise UserError(
            "--shots, --seeds, --queries: 1 or more; each --template has a {} for the name of a "
            'class, and stands in quotes: "a photo of a {}"'
        )
    device = cc.choose_device(args.cpu)
    torch.set_num_threads(1)  # small operators on several cores wait for each other
    paths = args.checkpoint or sorted(args.out.glob("*.pt"))
    if not paths:
        raise UserError(f"no checkpoint in {args.out}: python contextclip.py trains some")
    runs = load_runs(paths, device)
    model, *_ = runs[0].values()
    tasks, validation = make_tasks(args, model, device)
    if not tasks:
        raise UserError("models of your own images need --data, a folder per class")
    chosen = [*choose(runs[0], validation, methods, shots, args.queries)]
    rows = []
    for i, models in enumerate(runs):
        seeds = range(i * args.seeds, (i + 1) * args.seeds)
        rows += evaluate(models, tasks, chosen, seeds, max(shots), args.queries)

    table = tabulate(rows, shots, len(runs), args.seeds)
    try:
        report(table, shots)
    finally:  # what cannot be printed is written, and what cannot be written is printed
        args.out.mkdir(parents=True, exist_ok=True)
        cc.write_csv(args.out / "fewshot.csv", rows)
        draw_curves(table, shots, args.out / "accuracy_vs_shots.png")


def main(arguments=None):
    parser = argparse.ArgumentParser("fewshot", argparse.SUPPRESS, "Few-shot evaluation.")
    add = parser.add_argument
    add("--checkpoint", nargs="+", type=Path, help="models, a folder per training run (OUT/*.pt)")
    add("--shots", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32], help="per class (1 to 32)")
    add("--seeds", type=int, default=3, help="draws of images, per training run (3)")
    add("--queries", type=int, default=16, help="images per class to classify (16)")
    add("--methods", nargs="*", choices=RIVALS, default=RIVALS, help="besides the six (all)")
    add("--tasks", nargs="+", choices=TASKS, default=TASKS, help="built-in ones (all)")
    add("--data", nargs="+", default=[], help="instead: folders of class folders, or MNIST, ...")
    add("--template", nargs="+", default=["{}"], help="captions of a class {}, their mean is taken")
    add("--plate", action="store_true", help="lay a number plate over each image")
    add("--cpu", action="store_true", help="use no accelerator")
    add("--out", type=Path, default="runs", help="folder of results and checkpoints (runs)")
    cc.run_program(parser, run, arguments)


if __name__ == "__main__":
    main()
