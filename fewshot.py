"""Few-shot classification with the models of contextclip.py: 21 tasks, accuracy against shots.

    python fewshot.py                                          compare the models in runs/
    python fewshot.py --data DIR --template "a photo of a {}"  on your images, a folder per class
    python fewshot.py --data MNIST --template "digit {}"       on a dataset of torchvision

An episode is a few labelled images per class, the support, and queries to classify. 1 classifiers,
2 tasks, 3 evaluation, 4 results, 5 the command line.
"""

import argparse
import itertools
import re
import zlib
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
# One signature: queries x (Q, d); a support of a few images per class, X (S, d), one-hot labels
# Y (S, C); text T (C, d), all normalised; scale, how far to trust the text (`text_scale`); then
# hyper-parameters. Scores (Q, C): the highest wins, of equal ones the first class.


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


def tip_x(x, X, Y, T, scale, a, b, g, temp=0.1):
    """Tip-Adapter + g R(-KL(p_x || p_X)) Y with p = softmax(. T^t / temp); R stretches a query's
    row into the range of its cosines x X^t (Udandarao et al. 2023)."""
    log_p_x = F.log_softmax(x @ T.T / temp, 1)
    log_p_X = F.log_softmax(X @ T.T / temp, 1)
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
TRAINING_FREE, OTHERS = list(CLASSIFIERS)[1:7], list(CLASSIFIERS)[7:]  # the paper's six; rivals
MEAN = "mean of the six"


def text_scale(X, Y, T, tau):
    """How far to trust the text: the scale s, a share of the model's tau, at which softmax(s X T^t)
    gives the support its labels with the highest likelihood; 0 where captions say nothing."""
    scales = tau * torch.tensor([0, 1, 2, 4, 8, 16, 32, 64]).to(X) / 64
    logits = scales[:, None, None] * (X @ T.T)  # (scales, S, C)
    likelihood = (logits.log_softmax(2) * Y).sum(2).mean(1)
    return scales[likelihood.argmax()]


# ---- 2. Tasks ------------------------------------------------------------------------------------
DATASETS = "MNIST", "FashionMNIST", "KMNIST", "CIFAR10", "CIFAR100"  # of torchvision, to name
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
FACES = {"seen": "test", "combined": "test", "unseen": "train", "validation": "validation"}
NO_TEXT = "unseen", "unnamed"  # no zero-shot: words are unknown, or captions of classes equal


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
            images.append(cc.draw_cards(self.cards, rows, numbers, FACES[self.group]))
        return torch.cat(images)


def card_tasks(cards, names=TASKS):
    """The built-in tasks, of 40 characters at most."""
    tasks = []
    for name in names:
        group, pattern = TASKS[name].split(" ", 1)
        rows = cards.rows_of("train" if group == "seen" else "test", FACES[group])
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
        """As `CardTask.draw`: the first images of a permutation of each class."""
        chosen = []
        for c, rows in enumerate(self.members):
            order = np.random.default_rng([seed, c]).permutation(rows)
            chosen.append(order[: queries + shots])
        return self.images[np.stack(chosen, 1).ravel()]


def read_images(source, args, model):
    """The arguments of an OwnTask: of a folder with a folder per class, or one of DATASETS. Raises
    UserError, OSError."""
    fit = cc.preprocess(model.settings)

    def read(path):
        try:
            return fit(Image.open(path))
        except Exception as error:
            raise cc.UserError(f"{path}: {error}") from error

    if source in DATASETS:
        make = getattr(datasets, source)
        try:
            data = make(args.out / "data", train=False, transform=fit, download=True)
        except RuntimeError as error:
            raise cc.UserError(f"--data {source}: {error}") from error
    elif source and Path(source).is_dir():
        data = datasets.ImageFolder(source, transform=read, loader=str)
        if not any(Path(path).parent.parent == Path(source) for path, _ in data.samples):
            raise cc.UserError(f"--data {source}: name the folder that holds the class folders")
    else:
        raise cc.UserError(f"--data {source!r}: no such folder, nor one of {', '.join(DATASETS)}")

    labels, needed = np.array(data.targets), args.queries + max(args.shots)
    few = np.bincount(labels).min() // (1 if model.settings.is_cards else 2)
    if few < needed:
        raise cc.UserError(f"--data {source}: a class has {few} images, {needed} are needed")
    images = torch.stack([image for image, _ in data])
    names = [re.sub(r"^\d - ", "", name).replace("_", " ") for name in data.classes]
    names = [cc.NUMERALS[int(n)] if re.fullmatch("[0-9]", n) else n for n in names]
    captions = [[text.replace("{}", name) for text in args.template] for name in names]
    tokens = {str(cc.tokenize(texts, model.vocabulary).tolist()) for texts in captions}
    group = "own" if len(tokens) == len(names) else "unnamed"
    if group == "unnamed":
        print(f"{source}: to the models some classes have the same caption: no zero-shot")
    return source, group, images, labels, captions


def with_plates(images, cards):
    """images (N, 1, S, S) -> (N, 1, 32, 32), a number plate in its own shades over each."""
    torch.manual_seed(0)
    images = F.interpolate(images.to(cards.device), cc.SIZE, mode="area")
    pixels = images.flatten(1)
    background = pixels.median(1, keepdim=True).values
    ink = pixels.gather(1, (pixels - background).abs().argmax(1, keepdim=True))  # farthest from it
    numbers = cc.integers(images, 0, 1000)
    cc.lay_plates(images, cards, numbers, "test", background[..., None], ink[..., None])
    return images


# ---- 3. Evaluation -------------------------------------------------------------------------------
def episodes(models, tasks, seeds, shots, queries):
    """Yields (model's name, task, seed, (x, X, T, tau_1)), each task drawn once for all models."""
    for task, seed in tqdm([*itertools.product(tasks, seeds)], leave=False, disable=None):
        images = task.draw(seed, shots, queries)
        n = queries * len(task.captions)
        for name, model in models.items():
            x = cc.embed_images(model, images.to(model.b.device))
            T = cc.embed_classes(model, task.captions)
            yield name, task, seed, (x[:n], x[n:], T, model.scalars()[0].item())


def accuracy(method, embedded, shots, hyper):
    """Percent of the queries that a classifier gets right with the first `shots` of the support."""
    x, X, T, tau = embedded
    X = X[: shots * len(T)]
    Y = torch.eye(len(T)).to(T).repeat(shots, 1)
    scale = text_scale(X, Y, T, tau)
    return cc.percent_right(CLASSIFIERS[method][0](x, X, Y, T, scale, **hyper))


def choose(models, validation, methods, shots, queries):
    """Yields (method, shots, hyper-parameters), those best on the validation tasks, of equal ones
    the first. One choice for all models: else its noise would pass for a gain."""
    embedded = [e for *_, e in episodes(models, validation, range(2), max(shots), queries)]
    for method in methods:
        grid = CLASSIFIERS[method][1]
        points = [dict(zip(grid, v, strict=True)) for v in itertools.product(*grid.values())]
        for k in [0] if method == "zero-shot" else shots:
            means = [np.mean([accuracy(method, e, k, point) for e in embedded]) for point in points]
            yield method, k, points[np.argmax(means)]


def evaluate(models, tasks, chosen, seeds, shots, queries):
    """Yields accuracies in percent of one training run's models, a dictionary each; zero-shot has 0
    shots."""
    for model, task, seed, embedded in episodes(models, tasks, seeds, shots, queries):
        for method, k, hyper in chosen:
            if k or task.group not in NO_TEXT:
                yield {
                    "model": model,
                    "task": task.name,
                    "group": task.group,
                    "method": method,
                    "shots": k,
                    "hyper": hyper,
                    "seed": seed,
                    "accuracy": accuracy(method, embedded, k, hyper),
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
    interval: Student's of the tasks' means and of the runs', the root of the sum of squares."""
    student = [0, 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23]  # by freedom
    square = 0.0
    for means in (values.mean(1), values.mean(0)):
        dof = len(means) - 1
        if dof:
            square += student[min(dof, 10)] ** 2 * means.var(ddof=1) / len(means)
    return values.mean(), square**0.5


def signed(values):
    mean, width = interval(values)
    return f"{mean:+.1f} ± {width:.1f}" if width else f"{mean:+.1f}"


def efficiency(base, context, shots):
    """{shots: how many times as many the base needs for the accuracy of context}, read off its
    curve over log2 shots; inf: it never gets there. Of an accuracy the first number of shots that
    reaches it counts: where more shots bring context nothing, there is none."""
    best, first = np.unique(np.maximum.accumulate(base), return_index=True)
    _, better = np.unique(np.maximum.accumulate(context), return_index=True)
    needed = np.interp(context, best, np.log2(shots)[first], right=np.inf)
    return {shots[i]: 2 ** needed[i] / shots[i] for i in better}


def print_table(title, cells, show, shots):
    """A line per method and a column per number of shots, of cells {(method, shots): values}."""
    print(f"\n{title:15}", *(f"{k}-shot".rjust(12) for k in shots))
    for method in dict.fromkeys(method for method, k in cells if k):
        print(f"{method:15}", *(show(cells[method, k]).rjust(12) for k in shots))
    found = cells.get(("zero-shot", 0))
    if found is not None:
        print(f"zero-shot, {len(found)} tasks: {show(found)}")


def report(table, shots):
    """Print the accuracy of each model, and what context adds to its base."""
    for model, cells in table.items():
        print_table(model, cells, lambda values: f"{values.mean():.1f}", shots)
    for base, context in (("clip", "clixp"), ("siglip", "siglixp")):
        if {base, context} <= table.keys():
            gains = {key: table[context][key] - cells for key, cells in table[base].items()}
            print_table(f"{context} - {base}", gains, signed, shots)
            means = [gains[MEAN, k] for k in shots]
            counts = [f"{(values.mean(1) > 0).sum()}" for values in means]
            print(f"tasks that gain, of {len(means[0])}:", ", ".join(counts))
            several = [values for values, k in zip(means, shots, strict=True) if k >= 4]
            title = f"{MEAN}, {'4 shots and more' if several else 'all shots'}"
            print(f"{title}: {signed(np.mean(several or means, axis=0))}")
            curves = [[table[model][MEAN, k].mean() for k in shots] for model in (base, context)]
            times = efficiency(*curves, shots)
            print("sample efficiency:", *(f" {k}-shot {times[k]:.1f}" for k in times))


def draw_curves(table, tasks, shots, path):
    """Accuracy against shots, the mean of the six: a panel for all tasks and for each group."""
    panels = list(dict.fromkeys(["all", *(task.group for task in tasks)]))
    figure = Figure((3.3 * len(panels), 3.6), layout="constrained")
    for place, panel in enumerate(panels, start=1):
        chosen = [panel in ("all", task.group) for task in tasks]
        axis = figure.add_subplot(1, len(panels), place)
        axis.set(title=f"{panel}: {sum(chosen)} task(s)", xlabel="shots", ylabel=f"% right, {MEAN}")
        for model, cells in table.items():
            means = [cells[MEAN, k][chosen].mean() for k in shots]
            axis.plot(list(map(str, shots)), means, "o-", label=model)
        axis.grid()
        axis.legend()
    figure.savefig(path, dpi=130)


# ---- 5. The command line -------------------------------------------------------------------------
def load_runs(paths, device):
    """[{model's name: model}], one per folder, that is, per training run. Raises UserError."""
    runs = {}
    for path in paths:
        runs.setdefault(path.parent, {})[path.stem] = cc.load(path, device)
    kinds = {(*sorted(run), *model.vocabulary) for run in runs.values() for model in run.values()}
    if len(kinds) > 1:
        raise cc.UserError("these folders hold different models, or models of other captions")
    return list(runs.values())


def make_tasks(args, model, device):
    """(tasks, those on which hyper-parameters are chosen). Raises UserError, OSError."""
    own = [read_images(source, args, model) for source in args.data]
    if args.plate and not (own and model.settings.is_cards):
        raise cc.UserError("--plate is laid over the images of --data, for models of cards")
    if not model.settings.is_cards:  # hyper-parameters: on half of the images of each class
        return [[OwnTask(*images, slice(i, None, 2)) for images in own] for i in (0, 1)]
    cards = cc.Cards(device)
    tasks = [OwnTask(*images) for images in own] or card_tasks(cards, args.tasks)
    for task in tasks if args.plate else []:
        task.images = with_plates(task.images, cards)
    return tasks, validation_tasks(cards)


def run(args):
    shots, methods = sorted(set(args.shots)), ["zero-shot", *TRAINING_FREE, *args.methods]
    if min(*shots, args.seeds, args.queries) < 1:
        raise cc.UserError("--shots, --seeds, --queries: 1 or more")
    device = cc.choose_device(args.cpu)
    torch.set_num_threads(1)  # small operators on several cores wait for each other
    paths = args.checkpoint or sorted(args.out.glob("*.pt"))
    if not paths:
        raise cc.UserError(f"no checkpoint in {args.out}: python contextclip.py trains some")
    runs = load_runs(paths, device)
    tasks, validation = make_tasks(args, next(iter(runs[0].values())), device)
    if not tasks:
        raise cc.UserError("models of your own images need --data, a folder per class")
    chosen = [*choose(runs[0], validation, methods, shots, args.queries)]
    rows = []
    for i, models in enumerate(runs):
        seeds = range(i * args.seeds, (i + 1) * args.seeds)
        rows += evaluate(models, tasks, chosen, seeds, max(shots), args.queries)

    table = tabulate(rows, shots, len(runs), args.seeds)
    report(table, shots)  # before anything is written, which may fail
    args.out.mkdir(parents=True, exist_ok=True)
    cc.write_csv(args.out / "fewshot.csv", rows)
    draw_curves(table, tasks, shots, args.out / "accuracy_vs_shots.png")


def main(arguments=None):
    parser = argparse.ArgumentParser("fewshot", argparse.SUPPRESS, "Few-shot evaluation.")
    add = parser.add_argument
    add("--checkpoint", nargs="+", type=Path, help="models, a folder per training run (OUT/*.pt)")
    add("--shots", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32], help="per class (1 to 32)")
    add("--seeds", type=int, default=3, help="draws of images, per training run (3)")
    add("--queries", type=int, default=16, help="images per class to classify (16)")
    add("--methods", nargs="*", choices=OTHERS, default=OTHERS, help="besides the six (all)")
    add("--tasks", nargs="+", choices=TASKS, default=TASKS, help="built-in ones (all)")
    add("--data", nargs="+", default=[], help="instead: folders of class folders, or MNIST, ...")
    add("--template", nargs="+", default=["{}"], help="captions of a class {}, their mean is taken")
    add("--plate", action="store_true", help="lay a number plate over each image")
    add("--cpu", action="store_true", help="use no accelerator")
    add("--out", type=Path, default=Path("runs"), help="folder of results and checkpoints (runs)")
    cc.report_errors(parser, run, arguments)


if __name__ == "__main__":
    main()
