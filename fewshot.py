"""Few-shot classification with the models of contextclip.py: 21 tasks, accuracy against shots.

    python fewshot.py                                          compare the models in runs/
    python fewshot.py --data DIR --template "a photo of a {}"  on your own, a folder per class
    python fewshot.py --data MNIST --template "digit {}"       on a dataset of torchvision

An episode is a few labelled images per class, the support, and queries to classify. All classifiers
work on normalised embeddings. 1 classifiers, 2 tasks, 3 your own images, 4 evaluation, 5 tables and
figures, 6 the command line.
"""

import argparse
import io
import itertools
import json
import re
import zlib
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from torchvision import datasets
from tqdm import tqdm

import contextclip as cc

# ---- 1. Classifiers ------------------------------------------------------------------------------
# One signature: query x (Q, d), support X_s (S, d) with labels (S,), text T (C, d), all normalised;
# scale, how far to trust the text (`text_scale`); then hyper-parameters. Returns scores (Q, C):
# the highest wins, of equal ones the first class. Y_s: the labels, one-hot.


def zero_shot(query, support, labels, text, scale):
    """x T^t (Radford et al. 2021)."""
    return query @ text.T


def prototypes(query, support, labels, text, scale):
    """x P^t, P the class means of X_s, normalised again (Snell et al. 2017)."""
    return query @ cc.prototypes(support, labels, len(text)).T


def tip_adapter(query, support, labels, text, scale, a, b):
    """scale x T^t + a exp(-b (1 - x X_s^t)) Y_s (Zhang et al. 2022, with scale for their 100)."""
    near = (b * (query @ support.T - 1)).exp()
    return scale * (query @ text.T) + a * near @ F.one_hot(labels, len(text)).to(query)


def tip_x(query, support, labels, text, scale, a, b, g, temp=0.1):
    """Tip-Adapter + g R(-KL(p_query || p_support)) Y_s with p = softmax(x T^t / temp); R stretches
    a query's row into the range of its cosines (Udandarao et al. 2023)."""
    log_q, log_s = (F.log_softmax(x @ text.T / temp, dim=1) for x in (query, support))
    affinity = log_q.exp() @ log_s.T  # -KL up to a constant of the row, which R removes
    low, high = affinity.aminmax(dim=1, keepdim=True)
    start, end = (query @ support.T).aminmax(dim=1, keepdim=True)
    affinity = start + (affinity - low) / (high - low).clamp_min(1e-6) * (end - start)
    votes = affinity @ F.one_hot(labels, len(text)).to(query)
    return tip_adapter(query, support, labels, text, scale, a, b) + g * votes


def vote(query, support, labels, text, scale, k, weight):
    """The k nearest support images vote for their classes. Weights: "plurality" 1 each, and a
    little for nearness, 1 / 2 in all, so that of equal counts the nearer win; "softmax"
    exp(cos / 0.07) (Wu et al. 2018); "rank" 1 / (2 + rank), the first has rank 0."""
    k = min(k, len(labels))
    cosines, nearest = (query @ support.T).topk(k)
    ranks = torch.arange(k, device=query.device).expand_as(cosines)
    if weight == "plurality":
        weights = 1 + (k - ranks) / (k * (k + 1))
    elif weight == "softmax":
        weights = (cosines / 0.07).exp()
    else:
        weights = 1 / (2 + ranks)
    votes = torch.zeros(len(query), len(text)).to(query)
    return votes.scatter_add_(1, labels[nearest], weights.to(query))


def gda(query, support, labels, text, scale, shrink, trust=0.0):
    """Gaussian discriminant analysis: x S^-1 M_c - M_c S^-1 M_c / 2 + trust scale x T^t, M the
    class means, S the covariance within classes, shrunk towards the identity (Wang et al. 2024)."""
    counts = F.one_hot(labels, len(text)).to(query)
    M = counts.T @ support / counts.sum(0)[:, None]
    rest = support - M[labels]
    S = rest.T @ rest / len(rest)
    mean = S.trace() / len(S)
    if mean < 1e-9:  # one shot, S = 0: with the identity these are the prototypes
        S, mean = torch.zeros_like(S), 1.0
    S = (1 - shrink) * S + shrink * mean * torch.eye(len(S)).to(S)
    W = torch.linalg.solve(S, M.T)  # (d, C)
    return query @ W - (M.T * W).sum(0) / 2 + trust * scale * (query @ text.T)


def linear_probe(query, support, labels, text, scale, l2):
    """x W^t + c of the least mean cross-entropy of the support + l2 |W|^2 / 2."""
    W = torch.zeros_like(text, requires_grad=True)
    c = torch.zeros_like(text[:, 0], requires_grad=True)
    optimizer = torch.optim.LBFGS([W, c], max_iter=40, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = F.cross_entropy(support @ W.T + c, labels) + l2 / 2 * W.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return (query @ W.T + c).detach()


def tip_adapter_f(query, support, labels, text, scale, a, b, lr, steps=20):
    """Tip-Adapter whose keys, at first X_s, are trained: AdamW lowers the cross-entropy of support
    images, at most 128 a step, each classified by the others' keys and the text."""
    keys = support.clone().requires_grad_()
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW([keys], lr=lr, eps=1e-4)
    for _ in range(steps):
        rows = torch.randperm(len(labels), generator=generator)[:128].to(labels.device)
        x, y = support[rows], labels[rows]
        own = a * (b * ((x * keys[rows]).sum(1, keepdim=True) - 1)).exp() * F.one_hot(y, len(text))
        loss = F.cross_entropy(tip_adapter(x, keys, labels, text, scale, a, b) - own, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return tip_adapter(query, keys, labels, text, scale, a, b).detach()


SIX = {  # the paper's training-free classifiers, with their hyper-parameters
    "prototypes": (prototypes, {}),
    "Tip-Adapter": (tip_adapter, {"a": [10, 30, 100], "b": [2, 8]}),
    "Tip-X": (tip_x, {"a": [30], "b": [2, 8], "g": [3, 10, 30]}),
    "plurality vote": (partial(vote, weight="plurality"), {"k": [1, 2, 4, 8, 16, 32]}),
    "softmax vote": (partial(vote, weight="softmax"), {"k": [1, 4, 8, 16, 32, 64]}),
    "rank vote": (partial(vote, weight="rank"), {"k": [1, 4, 8, 16, 32, 64]}),
}
MEAN = "mean of the six"
SHRINK = [0.01, 0.03, 0.1, 0.3, 0.9]
CLASSIFIERS = {"zero-shot": (zero_shot, {})} | SIX
CLASSIFIERS |= {
    "GDA": (gda, {"shrink": SHRINK}),
    "GDA + text": (gda, {"shrink": SHRINK, "trust": [0.5, 2]}),
    "linear probe": (linear_probe, {"l2": [1e-5, 1e-4, 1e-3]}),
    "Tip-Adapter-F": (tip_adapter_f, {"a": [30], "b": [8], "lr": [1e-3, 3e-3, 1e-2]}),
}


def text_scale(support, labels, text, tau):
    """How far to trust the text: the scale s, a share of the model's tau, at which softmax(s x T^t)
    gives the support its labels with the highest likelihood; 0 where captions say nothing."""
    scales = tau * torch.tensor([0, *(2.0**e for e in range(-6, 1))]).to(support)
    logits = scales[:, None, None] * (support @ text.T)  # (scales, S, C)
    right = logits.log_softmax(-1)[:, torch.arange(len(labels), device=labels.device), labels]
    return scales[right.mean(1).argmax()]


# ---- 2. Tasks ------------------------------------------------------------------------------------

TASKS = {  # name: group, pattern of how "é latin small letter e with acute" begins
    "digits": ("seen", ". digit"), "Latin capitals": ("seen", "[A-Z]"),
    "Latin small letters": ("seen", "[a-z]"), "Greek": ("seen", ". greek"),
    "arrows": ("seen", "[\u2190-\u21cf]"), "operators": ("seen", "[\u2200-\u223f]"),
    "capitals + diacritic": ("combined", ". latin capital letter [a-z] with "),
    "small + diacritic": ("combined", ". latin small letter [a-z] with "),
    "Cyrillic": ("unseen", "[\u0410-\u044f]"), "Armenian": ("unseen", ". armenian"),
    "Georgian": ("unseen", ". georgian"), "Hebrew": ("unseen", "[\u05d0-\u05ea]"),
    "Arabic": ("unseen", "[\u0600-\u06ff] arabic letter"), "Lao": ("unseen", ". lao"),
    "Lisu": ("unseen", ". lisu"), "Canadian syllabics": ("unseen", ". canadian"),
    "Braille": ("unseen", ". braille"), "box drawing": ("unseen", ". box drawings"),
    "playing cards": ("unseen", ". playing card"), "dominoes": ("unseen", ". domino tile"),
    "hexagrams": ("unseen", ". hexagram"),
}  # fmt: skip
# seen: characters trained, typefaces never; combined: a letter and a diacritic never together;
# unseen: scripts never trained; own, unnamed: images of your own, with class names and without
NO_TEXT = ("unseen", "unnamed")  # no zero-shot: the words of the captions are not known

# captions: a list for each of C classes. draw(seed, shots, queries) -> (queries + shots, C, 1 or 3,
# S, S) images: the queries, the same for any number of shots; then the support, of which fewer
# shots are the first of more.
Task = namedtuple("Task", "name group captions draw")


def card_task(cards, name, group, members, faces):
    """A task of cards of some characters (their rows), in typefaces of one of cc.FACE_SPLITS."""
    members = torch.as_tensor(members, device=cards.device)

    def draw(seed, shots, queries):
        parts = []
        for i in range(1 + shots):  # the queries, then shot by shot
            role, count = ("support", 1) if i else ("query", queries)
            torch.manual_seed(zlib.crc32(f"{name} {seed} {role} {i}".encode()))
            images, _ = cc.draw_cards(cards, members.repeat(count), faces)
            parts.append(images.unflatten(0, (count, len(members))))
        return torch.cat(parts)

    return Task(name, group, [[cards.names[i]] for i in members], draw)


def card_tasks(cards, names=TASKS):
    """The built-in tasks. Seen and combined characters are drawn in STIX, never trained; the other
    scripts exist in DejaVu alone: there the characters are new, the typefaces are not."""
    new = [i for i, split in enumerate(cards.splits) if split == "test"]
    fits = {"seen": cards.train.tolist(), "combined": [*filter(cards.knows, new)], "unseen": new}
    starts = [f"{c} {name}" for c, name in zip(cards.index, cards.names, strict=True)]
    tasks = []
    for name in dict.fromkeys(names):
        group, pattern = TASKS[name]
        faces = "train" if group == "unseen" else "test"
        drawn = cards.drawn[:, cc.FACE_SPLITS[faces]].any(1).tolist()
        members = [i for i in fits[group] if drawn[i] and re.match(pattern, starts[i])]
        members.sort(key=lambda i: zlib.crc32(cards.names[i].encode()))  # 40 by chance
        if len(members) > 1:  # a model of few characters has not seen all
            tasks.append(card_task(cards, name, group, sorted(members[:40]), faces))
    return tasks


def validation_tasks(cards):
    """Tasks to choose hyper-parameters on: cards neither trained nor tested."""
    split = "validation"
    return [card_task(cards, name, split, m, split) for name, m in cards.validation.items()]


# ---- 3. Your own images --------------------------------------------------------------------------

TEST = {"train": False}
UPRIGHT = partial(Image.Image.transpose, method=Image.Transpose.TRANSPOSE)  # EMNIST lies sideways
DATASETS = {  # of torchvision: how its test part is had
    "MNIST": TEST, "FashionMNIST": TEST, "KMNIST": TEST, "QMNIST": TEST, "USPS": TEST,
    "EMNIST": TEST | {"split": "letters", "transform": UPRIGHT}, "CIFAR10": TEST, "CIFAR100": TEST,
    "Omniglot": {"background": False}, "SVHN": {"split": "test"}, "STL10": {"split": "test"},
    "Food101": {"split": "test"}, "DTD": {"split": "test"}, "OxfordIIITPet": {"split": "test"},
    "Flowers102": {"split": "test"}, "EuroSAT": {},
}  # fmt: skip


def open_dataset(source, root):
    """A folder with a folder per class, or the test or validation part of one with parts, of paths;
    or a torchvision dataset, downloaded into `root` if need be. Raises UserError."""
    folder = Path(source)
    if not folder.is_dir():
        if source not in DATASETS:
            raise cc.UserError(f"--data {source}: no such folder, nor one of {', '.join(DATASETS)}")
        with cc.blame(f"--data {source}: cannot be had (a missing package: pip install it)"):
            return getattr(datasets, source)(root, download=True, **DATASETS[source])
    parts = [part for name in ("test", "val", "valid") if (part := folder / name).is_dir()]
    if parts and (folder / "train").is_dir():
        folder = parts[0]
        print(f"{source}: its part {folder.name}")

    def wanted(path):
        parts = Path(path).relative_to(folder).parts
        return path.lower().endswith(cc.EXTENSIONS) and all(map(cc.visible, parts))

    return datasets.ImageFolder(folder, loader=str, is_valid_file=wanted, allow_empty=True)


def spell(name):
    """A class's name in a caption: of "0 - zero" the word, and of "0" too."""
    name = re.sub(r"^\d - ", "", name).replace("_", " ")
    return cc.NUMERALS[int(name)] if name in list("0123456789") else name


def with_plates(images, cards):
    """A number plate over each image (N, 1, 32, 32), in its own shades: the median and the value
    farthest from it."""
    torch.manual_seed(0)
    images = images.to(cards.device, copy=True)
    flat = images.flatten(2)[..., None]  # (N, 1, pixels, 1), so that shades are (N, 1, 1, 1)
    paper = flat.median(dim=2, keepdim=True).values
    pen = flat.gather(2, (flat - paper).abs().argmax(dim=2, keepdim=True))
    numbers = torch.randint(10, (len(images), 3), device=cards.device)
    cc.lay_plates(images, cards, numbers, "test", paper, pen)
    return images


def read_dataset(source, args, settings, cards=None):
    """images (N, 1 or 3, S, S), labels (N,), {label: class name} and the group of a task of them.
    Raises UserError."""
    dataset = open_dataset(source, args.out / "data")
    fit = cc.preprocess(settings)

    def read(i):
        image, label = dataset[i]
        return fit(image), int(label)

    places = [f"{source}, image {i}" for i in range(len(dataset))]
    if isinstance(dataset, datasets.ImageFolder):
        places = [path for path, _ in dataset.samples]
    pairs = cc.read_images(read, dict(enumerate(places)), [], args.skip_bad).values()
    labels = np.array([label for _, label in pairs])
    classes = getattr(dataset, "classes", "0123456789" if source in ("USPS", "SVHN") else [])
    names = {y: spell(classes[y]) if classes else f"class {y}" for y in sorted(set(labels))}
    if len({tuple(cc.split_words(name)) for name in names.values()}) < max(2, len(names)):
        raise cc.UserError(f"--data {source}: it needs two classes or more, of different names")
    images = torch.stack([image for image, _ in pairs])
    images = with_plates(images, cards) if args.plate else images
    return images, labels, names, "own" if classes else "unnamed"


def image_task(source, args, images, labels, names, group, part=slice(None)):
    """A task of one's own images, `part` of each class's. One permutation per class and seed: the
    first are the queries, the next the support. Raises UserError."""
    members = [np.flatnonzero(labels == y)[part] for y in names]
    for name, found in zip(names.values(), members, strict=True):
        if len(found) < args.queries + max(args.shots):
            few = f"{len(found)} images" + " (a half of them)" * (part.step == 2)
            few += f" are too few for {args.queries} queries, {max(args.shots)} shots"
            raise cc.UserError(f"--data {source}, {name}: {few}")

    def draw(seed, shots, queries):
        orders = [np.random.default_rng([seed, c]).permutation(m) for c, m in enumerate(members)]
        return images[np.stack([order[: queries + shots] for order in orders], axis=1)]

    captions = [[text.replace("{}", name) for text in args.template] for name in names.values()]
    return Task(source, group, captions, draw)


# ---- 4. Evaluation -------------------------------------------------------------------------------


@torch.no_grad()
def embed(model, task, seed, shots, queries):
    """(query (queries C, d), support (shots C, d), text (C, d), tau_1); row r is of class r % C."""
    C = len(task.captions)
    images = task.draw(seed, shots, queries).flatten(0, 1).to(model.b.device)
    query, support = cc.embed_images(model, images).split([queries * C, shots * C])
    return query, support, cc.embed_classes(model, task.captions), model.temperatures()[0].item()


def accuracy(method, embedded, shots, hyper):
    """Percent of the queries that a classifier gets right with the first `shots` of the support."""
    query, support, text, tau = embedded
    C, device = len(text), text.device
    support = support[: shots * C]
    labels = torch.arange(C, device=device).repeat(shots)
    scale = text_scale(support, labels, text, tau) if shots else None
    predicted = CLASSIFIERS[method][0](query, support, labels, text, scale, **hyper).argmax(1)
    right = predicted == torch.arange(C, device=device).repeat(len(query) // C)
    return 100 * right.float().mean().item()


def episodes(models, tasks, seeds, shots, queries):
    """(model's name, task, seed, embeddings) of each, drawn one by one: draws seed torch."""
    combinations = list(itertools.product(tasks, models, seeds))
    for task, name, seed in tqdm(combinations, "episodes", leave=False, disable=None):
        yield name, task, seed, embed(models[name], task, seed, shots, queries)


def in_threads(function, items):
    """[function(item), ...], a thread per core: small operators on several wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with ThreadPoolExecutor(threads) as pool:
        results = list(pool.map(function, items))
    torch.set_num_threads(threads)
    return results


def choose(models, validation, methods, shots, queries):
    """{method: {shots: hyper-parameters}} of the highest mean accuracy on the validation tasks, of
    equal ones the first. One choice for all models: else its noise would pass for a gain."""
    chances = episodes(models, validation, range(2), max(shots), queries)
    embedded = in_threads(lambda episode: episode[-1], chances)

    def best(method):
        grid = CLASSIFIERS[method][1]
        points = [dict(zip(grid, v, strict=True)) for v in itertools.product(*grid.values())]
        chosen = {}
        for k in [0] if method == "zero-shot" else shots:
            means = [np.mean([accuracy(method, e, k, point) for e in embedded]) for point in points]
            chosen[k] = points[int(np.argmax(means))]
        return chosen

    return dict(zip(methods, in_threads(best, methods), strict=True))


def evaluate(models, tasks, chosen, seeds, shots, queries):
    """Rows (model, task, group, method, shots, seed, accuracy) of one training run's models;
    zero-shot has 0 shots, and none where words of the captions were never trained."""

    def classify(episode):
        name, task, seed, embedded = episode
        rows = []
        for method, points in chosen.items():
            for k, point in points.items():
                if k or task.group not in NO_TEXT:
                    value = accuracy(method, embedded, k, point)
                    rows.append((name, task.name, task.group, method, k, seed, value))
        return rows

    return sum(in_threads(classify, episodes(models, tasks, seeds, shots, queries)), [])


# ---- 5. Tables and figures -----------------------------------------------------------------------

BASES = {"clixp": "clip", "siglixp": "siglip"}
STUDENT = [np.nan, 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23]  # 95 %, by freedom


def interval(values):
    """values (tasks, seeds) -> the mean and the half-width of its 95 % interval, tasks and seeds
    both drawn by chance: two-way clustered variance (Cameron, Gelbach, Miller 2011), Student's t
    with the smaller number less 1."""
    deviations = values - values.mean()

    def variance(sums):  # of the mean, from independent sums of deviations
        return (sums**2).sum() / values.size**2 * len(sums) / max(1, len(sums) - 1)

    tasks, seeds = variance(deviations.sum(1)), variance(deviations.sum(0))
    both = variance(deviations.ravel())  # is counted in either
    freedom = min((n - 1 for n in values.shape if n > 1), default=0)
    total = max(tasks + seeds - both, tasks, seeds)
    return values.mean(), STUDENT[min(freedom, 10)] * total**0.5


def tabulate(rows, per_run):
    """{(model, method, shots): accuracies (tasks, runs)}; the `per_run` draws of images of a
    training run count as one, their mean; with one training run the draws stand for runs."""
    cells, table = {}, {}
    for model, task, _, method, shots, _, value in rows:
        cells.setdefault((model, method, shots), {}).setdefault(task, []).append(value)
    for key, tasks in cells.items():
        values = np.array(list(tasks.values()))  # (tasks, runs x draws), run by run
        runs = values.reshape(len(values), -1, per_run).mean(2)
        table[key] = runs if runs.shape[1] > 1 else values
    for model, method, shots in list(table):
        if method == "prototypes" and all((model, m, shots) in table for m in SIX):
            table[model, MEAN, shots] = np.mean([table[model, m, shots] for m in SIX], axis=0)
    return table


def efficiency(base, context, shots):
    """Sample efficiency at each number of shots k: how many shots the base needs for the accuracy
    of context with k, read off its curve over log2 shots, divided by k; inf where it never gets
    there; where its fewest shots do better, the fewest / k."""
    needed = np.interp(context, np.maximum.accumulate(base), np.log2(shots), right=np.inf)
    return 2**needed / np.array(shots)


def signed(values):
    mean, width = interval(values)
    return f"{mean:+.1f} ± {width:.1f}".removesuffix(" ± nan")


def report(table, tasks, shots):
    """Print the tables. Means are over tasks, each of which counts the same, and training runs."""
    models, methods = (list(dict.fromkeys(key[i] for key in table)) for i in (0, 1))
    methods = [method for method in methods if method != "zero-shot"]
    groups = np.array([task.group for task in tasks if task.group not in NO_TEXT])
    for model in models:
        rows = []
        for m in methods:
            rows.append({model: m} | {f"{k}-shot": table[model, m, k].mean() for k in shots})
        cc.print_table(rows)
        for group in dict.fromkeys(groups) if (model, "zero-shot", 0) in table else ():
            mean = table[model, "zero-shot", 0][groups == group].mean()
            print(f"{model}, zero-shot, {group}: {mean:.1f}")
        print()
    for context in models:
        if BASES.get(context) in models:
            compare(table, tasks, BASES[context], context, methods, shots)


def compare(table, tasks, base, context, methods, shots):
    """Print what context adds to its base, with intervals, and by task at 16 shots or the most."""
    gains = {key[1:]: table[key] - table[base, *key[1:]] for key in table if key[0] == context}
    title = f"{context} - {base}"
    if ("zero-shot", 0) in gains:
        print(f"{title}, zero-shot:", signed(gains["zero-shot", 0]))
    rows = [{title: m} | {f"{k}-shot": signed(gains[m, k]) for k in shots} for m in methods]
    if MEAN in methods:
        counts = [(gains[MEAN, k].mean(1) > 0).sum() for k in shots]
        counts = {f"{k}-shot": f"{n} of {len(tasks)}" for k, n in zip(shots, counts, strict=True)}
        rows.append({title: "tasks that gain"} | counts)
    cc.print_table(rows)
    if MEAN in methods:
        several = [k for k in shots if k >= 4] or shots
        mean = sum(gains[MEAN, k] for k in several) / len(several)
        print(f"{MEAN}, {several[0]} to {several[-1]} shots together:", signed(mean))
        curves = [[table[model, MEAN, k].mean() for k in shots] for model in (base, context)]
        times = zip(shots, efficiency(*curves, shots), strict=True)
        print("sample efficiency:", ", ".join(f"{k}-shot {time:.2f}" for k, time in times))
        k = max([k for k in shots if k <= 16], default=shots[0])
        rows = []
        for i, task in enumerate(tasks):
            row = {f"{MEAN}, {k}-shot": task.name, "group": task.group}
            row |= {model: table[model, MEAN, k][i].mean() for model in (base, context)}
            rows.append(row | {title: signed(gains[MEAN, k][i : i + 1])})
        print()
        cc.print_table(rows)


def draw_curves(table, tasks, shots, path):
    """Accuracy against shots, the mean of the six, with bands over runs: a panel per group."""
    models = [model for model, method, k in table if (method, k) == (MEAN, shots[0])]
    groups = np.array([task.group for task in tasks])
    panels = ["all", *dict.fromkeys(groups)] if len(set(groups)) > 1 else [groups[0]]
    figure = Figure((3.3 * len(panels) + 0.5, 3.6), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, panel in zip(axes, panels, strict=True):
        chosen = (groups == panel) | (panel == "all")
        for i, model in enumerate(models):
            values = [table[model, MEAN, k][chosen].mean(0, keepdims=True) for k in shots]
            mean, width = np.nan_to_num(np.array([interval(v) for v in values]).T)
            line = "s-" if model in BASES else "o--"
            axis.plot(shots, mean, line, markersize=4, color=f"C{i}", label=model)
            axis.fill_between(shots, mean - width, mean + width, color=f"C{i}", alpha=0.25)
        axis.set(title=f"{panel}: {sum(chosen)} task(s)", xlabel="shots", xscale="log")
        axis.set_xticks(shots, map(str, shots))
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(f"% right, {MEAN}")
    axes[0].legend(fontsize=8)
    save_figure(figure, path)


def save_figure(figure, path):
    figure.savefig(buffer := io.BytesIO(), dpi=130)
    cc.write_file(path, buffer.getvalue())


# ---- 6. Command line -----------------------------------------------------------------------------


def load_runs(paths, device):
    """[{model's name: model}, ...], one per folder, that is, training run. Raises UserError."""
    runs = {}
    for path in paths:
        runs.setdefault(path.parent, {})[path.stem] = cc.load(path, device)
    runs = list(runs.values())
    if any(run.keys() != runs[0].keys() for run in runs):
        raise cc.UserError("the folders of these checkpoints hold different models")
    models = [model for run in runs for model in run.values()]
    if len({(*model.vocabulary, model.settings.image_size) for model in models}) > 1:
        raise cc.UserError("these models learned different captions or image sizes: one by one")
    return runs


def make_parser():
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description="Few-shot evaluation.")
    add = partial(parser.add_argument, metavar="X")
    add("--checkpoint", nargs="+", type=Path, help="models, a folder per training run (OUT/*.pt)")
    add("--shots", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32], help="per class (1 to 32)")
    add("--seeds", type=int, default=3, help="draws of images, per training run (3)")
    add("--queries", type=int, default=16, help="images per class to classify (16)")
    add("--methods", nargs="+", choices=CLASSIFIERS, default=list(CLASSIFIERS), help="(all)")
    add("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="built-in ones (all)")
    add("--data", nargs="+", help="instead: folders of a folder per class, datasets of torchvision")
    add("--template", nargs="+", default=["{}"], help="captions of a class {}, their mean is taken")
    parser.add_argument("--plate", action="store_true", help="lay a number plate over each image")
    parser.add_argument("--skip-bad", action="store_true", help="leave unreadable images out")
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps (auto)")
    add("--out", type=Path, default=Path("runs"), help="folder of results and checkpoints (runs)")
    return parser


@cc.errors_in_one_line("fewshot")
def main(arguments=None):
    args = make_parser().parse_args(arguments)
    if min(*args.shots, args.seeds, args.queries) < 1 or not all("{}" in t for t in args.template):
        raise cc.UserError("--shots, --seeds, --queries: 1 or more; --template: with a {}")
    args.data = list(dict.fromkeys(str(Path(source)) for source in args.data or []))
    shots = sorted(set(args.shots))
    device = cc.choose_device(args.device)
    paths = args.checkpoint or sorted(args.out.glob("*.pt"))
    if not paths:
        raise cc.UserError(f"no checkpoint in {args.out}: python contextclip.py trains some")
    runs = load_runs(paths, device)
    settings = next(iter(runs[0].values())).settings
    args.out.mkdir(parents=True, exist_ok=True)
    if settings.data and args.plate:
        raise cc.UserError("--plate: only for models of cards")
    if settings.data and not args.data:
        raise cc.UserError("these models were trained on images of your own: what is --data?")
    if args.plate:  # made for 32 pixels; models of another size resize the images
        settings = replace(settings, image_size=cc.SIZE)
    cards = None if settings.data else cc.Cards(device, settings)
    own = [(source, args, *read_dataset(source, args, settings, cards)) for source in args.data]
    if settings.data:  # hyper-parameters are chosen on half of the images of each class
        tasks = [image_task(*data, slice(0, None, 2)) for data in own]
        validation = [image_task(*data, slice(1, None, 2)) for data in own]
    else:
        tasks = [image_task(*data) for data in own] or card_tasks(cards, args.tasks)
        validation = validation_tasks(cards)
    if not tasks:
        raise cc.UserError("these models were trained on too few characters for these tasks")
    chosen = choose(runs[0], validation, args.methods, shots, args.queries)
    rows = []
    for i, models in enumerate(runs):
        seeds = range(i * args.seeds, (i + 1) * args.seeds)
        rows += evaluate(models, tasks, chosen, seeds, max(shots), args.queries)
    columns = ("model", "task", "group", "method", "shots", "seed", "accuracy")
    cc.write_csv(args.out / "fewshot.csv", [columns, *rows])
    cc.write_file(args.out / "fewshot.json", json.dumps(chosen, indent=1).encode())
    table = tabulate(rows, args.seeds)
    report(table, tasks, shots)
    if any(method == MEAN for _, method, _ in table):
        draw_curves(table, tasks, shots, args.out / "accuracy_vs_shots.png")


if __name__ == "__main__":
    main()
