"""The pictures of the page on kernels, drawn from boxes and arrows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from xml.sax.saxutils import escape

_INK, _PALE = "#26323a", "#6b7a83"
BLUE, GREEN, ORANGE, GREY, RED = "#cfe3f5", "#d3ead9", "#fbe3c3", "#e8ecee", "#f6d4d1"


class Canvas:
    """An SVG of a given size on white, with boxes, arrows and words."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.width, self.height, self.title = width, height, title
        self.parts: list[str] = []

    def box(
        self,
        x: float,
        y: float,
        w: float,
        h: float,
        text: str = "",
        fill: str = GREY,
        size: int = 13,
    ) -> None:
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="4" fill="{fill}" stroke="{_INK}" '
            'stroke-width="1"/>'
        )
        lines = text.split("\n") if text else []
        for i, line in enumerate(lines):
            at = y + h / 2 + (i - (len(lines) - 1) / 2) * (size + 3) + size * 0.35
            self.text(x + w / 2, at, line, size, anchor="middle")

    def text(
        self, x: float, y: float, text: str, size: int = 13, anchor: str = "start",
        colour: str = _INK,
    ) -> None:  # fmt: skip
        self.parts.append(
            f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}" fill="{colour}">'
            f"{escape(text)}</text>"
        )

    def note(self, x: float, y: float, text: str) -> None:
        for i, line in enumerate(text.split("\n")):
            self.text(x, y + 16 * i, line, 12, colour=_PALE)

    def arrow(self, x1: float, y1: float, x2: float, y2: float, dashed: bool = False) -> None:
        dash = ' stroke-dasharray="4 3"' if dashed else ""
        self.parts.append(
            f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{_INK}" stroke-width="1.2"'
            f'{dash} marker-end="url(#tip)"/>'
        )

    def svg(self) -> str:
        body = "\n".join(self.parts)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" '
            'font-family="system-ui, sans-serif" role="img">\n'
            f"<title>{escape(self.title)}</title>\n"
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
            f'markerHeight="7" orient="auto"><path d="M0 0 8 4 0 8z" fill="{_INK}"/></marker>'
            f'</defs>\n<rect width="{self.width}" height="{self.height}" rx="8" fill="#fff"/>\n'
            f"{body}\n</svg>\n"
        )


def _row(c: Canvas, x: float, y: float, texts: Sequence[str], w: float, fill: str) -> None:
    for i, text in enumerate(texts):
        c.box(x + i * w, y, w - 4, 26, text, fill, 12)


def packed_pass() -> str:
    c = Canvas(760, 300, "One packed pass for ITM and LM")
    c.text(20, 28, "ITM: 3B texts, [ENC]", 13)
    _row(c, 20, 38, ["pos 1", "pos 2", "neg", "neg", "neg", "neg"], 52, BLUE)
    c.text(400, 28, "LM: B texts, [DEC]", 13)
    _row(c, 400, 38, ["1", "2"], 52, ORANGE)
    c.note(540, 44, "no padding: a text takes\nas many rows as it has tokens")
    for y, kind in ((86, "self-attention"), (166, "cross-attention"), (226, "feed-forward")):
        if kind == "self-attention":
            c.box(20, y, 308, 40, "self-attention of the encoder", BLUE)
            c.box(400, y, 100, 40, "of the decoder", ORANGE)
        else:
            c.box(20, y, 480, 40, f"{kind}: one set of weights, one product", GREEN)
        c.arrow(170, y - 20, 170, y - 2)
        c.arrow(450, y - 20, 450, y - 2)
    c.box(570, 166, 160, 40, "K/V of B images,\nprojected once", GREY, 12)
    c.arrow(568, 186, 504, 186)
    c.note(540, 96, "the one thing that\nthey do not share")
    c.note(
        20,
        290,
        "Per layer the original projects every image four times: positive, two negatives, LM.",
    )
    return c.svg()


def cross_attention() -> str:
    c = Canvas(760, 310, "Cross-attention with indexed keys and values")
    c.text(20, 28, "packed queries, grouped by the image they look at", 13)
    colours = (BLUE, GREEN, ORANGE)
    x = 20.0
    starts = []
    for image, lengths in enumerate(((56, 44, 52), (116,), (52, 60))):
        starts.append((x, sum(lengths) + 4 * len(lengths)))
        for n, width in enumerate(lengths):
            c.box(x, 40, width, 30, f"text {n + 1}", colours[image], 11)
            x += width + 4
        x += 10
    c.note(x + 10, 52, "cu_seqlens, kv_index")
    for image, (start, width) in enumerate(starts):
        c.arrow(start + width / 2, 74, start + width / 2, 118)
        c.box(start, 120, width, 44, f"tiles of rows of\nimage {image + 1}", colours[image], 12)
        c.arrow(start + width / 2, 226, start + width / 2, 168)
        c.box(start, 228, width, 34, f"K, V of image {image + 1}", GREY, 11)
    c.note(
        540,
        132,
        "one program reads each K/V tile\nonce for all texts of the image,\nwith an online softmax",
    )
    c.note(
        488,
        236,
        "dK, dV: summed by the program that\n"
        "owns the tile, over the rows that the\n"
        "index lists: no atomics, same every run",
    )
    c.note(
        20,
        292,
        "Beams, answer candidates and hard negatives are more texts "
        "of an image: its K/V stay where they are.",
    )
    return c.svg()


def dense_attention() -> str:
    c = Canvas(760, 320, "Attention on a CPU, a head at a time")
    c.text(20, 28, "a head of an image belongs to one thread", 13)
    for i in range(5):
        c.box(20, 40 + i * 30, 100, 26, "8 queries", BLUE if i == 1 else GREY, 12)
    c.box(180, 40, 150, 40, "keys, transposed", GREEN, 12)
    c.box(180, 192, 150, 40, "values, in pairs", GREEN, 12)
    c.note(180, 250, "packed once, they stay\nin the caches")
    c.arrow(122, 84, 388, 94)
    c.arrow(332, 60, 388, 74)
    c.box(392, 62, 160, 44, "scores of 8 queries,\nfp32", ORANGE, 12)
    c.arrow(472, 108, 472, 132)
    c.box(392, 134, 160, 44, "weights of 8 queries,\nrounded once", ORANGE, 12)
    c.arrow(332, 212, 640, 182)
    c.arrow(554, 156, 606, 156)
    c.box(610, 134, 130, 44, "outputs, and\nlog of the sums", BLUE, 12)
    c.note(
        392,
        226,
        "The backward forms scores and weights again\n"
        "from queries, keys and the logs. Gradients of\n"
        "keys and values are the sums of one thread:\n"
        "the same bits for any number of threads.",
    )
    c.note(20, 308, "No weights are kept, and none of the (queries x keys) matrices exists.")
    return c.svg()


def contrastive() -> str:
    c = Canvas(760, 290, "Contrastive softmax in one pass over the keys")
    c.box(20, 40, 110, 60, "queries q\n(B, D)", BLUE)
    c.box(20, 110, 110, 60, "teacher q'\n(B, D)", ORANGE)
    c.text(180, 30, "keys: batch features, then the queue, a tile at a time", 13)
    for i in range(7):
        c.box(
            180 + i * 58,
            40,
            54,
            130,
            "batch" if i == 0 else f"tile {i}",
            GREEN if i == 3 else GREY,
            12,
        )
    c.arrow(134, 105, 176, 105)
    c.arrow(381, 172, 381, 198)
    c.box(
        180,
        200,
        402,
        56,
        "per row: running maximum, sum of exponentials, mean key\nof student and teacher together",
        BLUE,
        12,
    )
    c.note(600, 60, "the (B, N) matrix\nnever exists")
    c.note(596, 212, "loss, dq and dT follow\nfrom logsumexp and the\ntwo mean keys")
    c.note(
        20,
        280,
        "Keys are read a second time only when they need a gradient themselves (CLIP's case).",
    )
    return c.svg()


def hard_negatives() -> str:
    c = Canvas(760, 250, "Hard negatives by Gumbel-max")
    c.box(20, 50, 130, 60, "similarities\nof a tile", BLUE)
    c.box(200, 50, 150, 60, "log(softmax + eps)\nequal ids: -inf", GREEN)
    c.box(400, 50, 150, 60, "plus Gumbel noise\nof (row, column)", ORANGE)
    c.box(600, 50, 130, 60, "running best\nof each row", BLUE)
    for x in (152, 352, 552):
        c.arrow(x, 80, x + 46, 80)
    c.box(400, 150, 150, 50, "Philox(seed, step,\nrow, column)", GREY)
    c.arrow(475, 148, 475, 114)
    c.note(
        20,
        150,
        "A draw with weight softmax + eps is the\n"
        "maximum of log weight plus Gumbel noise:\n"
        "no probabilities, no cumulative sums,\n"
        "nothing that the host waits for.",
    )
    c.note(
        556,
        150,
        "the number of a pair is a\n"
        "function of its place alone:\n"
        "the same draw on any device,\n"
        "tile size and number of ranks",
    )
    return c.svg()


def linear_ce() -> str:
    c = Canvas(760, 420, "Linear cross-entropy without all logits")
    c.text(20, 28, "PyTorch, on a CPU: some tokens at a time", 13)
    c.box(20, 40, 120, 100, "hidden states\nof labelled tokens\n(T, D)", BLUE)
    for i in range(3):
        y = 40 + 35 * i
        c.arrow(142, y + 15, 196, y + 15)
        c.box(200, y, 250, 30, f"logits of piece {i + 1}: (C, V)", GREEN if i == 1 else GREY)
        c.arrow(452, y + 15, 506, y + 15)
    c.box(
        510,
        40,
        220,
        100,
        "loss of the piece, and at once\nits gradients dh, dW, db:\nthe logits are then forgotten",
        ORANGE,
        13,
    )
    c.note(20, 160, "Ignored tokens and the prompt are left out before anything is multiplied.")

    c.text(20, 208, "Kernels, on a GPU: some of the vocabulary at a time", 13)
    c.text(20, 232, "backward, piece 2 of 9", 12, colour=_PALE)
    c.box(200, 222, 250, 24, "rows of dW that are done", ORANGE, 12)
    c.box(200, 250, 250, 40, "rows of this piece: dzᵀ h", GREEN)
    c.box(200, 294, 250, 66, "", GREY)
    c.box(206, 300, 180, 54, "the piece's logits, which\nbecome dz in place", BLUE, 12)
    c.box(510, 250, 220, 40, "dh += dz W, in float32", GREEN)
    c.arrow(300, 300, 300, 291)
    c.arrow(388, 327, 560, 292)
    c.text(20, 274, "dW (V, D)", 13)
    c.text(20, 326, "rows of later pieces", 12)
    c.note(
        20,
        388,
        "No row of dW is summed over pieces, and the logits lie where nothing has been written.\n"
        "Beside dW no matrix is larger than h in float32. The forward left the log-sum-exps.",
    )
    return c.svg()


def add_layer_norm() -> str:
    c = Canvas(760, 250, "Dropout, residual and LayerNorm in one pass")
    c.box(20, 40, 130, 40, "residual row", BLUE)
    c.box(20, 100, 130, 40, "branch row", GREEN)
    c.box(20, 170, 130, 40, "Philox(seed,\nrow, column)", GREY, 12)
    c.arrow(85, 168, 85, 144)
    c.arrow(152, 60, 216, 80)
    c.arrow(152, 120, 216, 100)
    c.box(220, 60, 140, 60, "h = residual\n+ dropout(branch)", ORANGE)
    c.arrow(362, 90, 416, 90)
    c.box(420, 60, 140, 60, "mean, 1 / std\nin registers", GREY)
    c.arrow(562, 76, 616, 66)
    c.arrow(562, 104, 616, 116)
    c.box(620, 40, 120, 40, "h, rounded", ORANGE)
    c.box(620, 100, 120, 40, "LayerNorm(h)", BLUE)
    c.note(
        220,
        164,
        "Forward: two rows are read, two written, once each. Backward: h and the\n"
        "gradients of both are read once; the mask is drawn again, and the gradients\n"
        "of weight and bias are partial sums of each program: no atomics.",
    )
    c.note(
        20,
        238,
        "Under autocast the layers' casts to float32 and back, and the float32 copy kept for the "
        "backward, are gone.",
    )
    return c.svg()


def capfilt() -> str:
    c = Canvas(760, 240, "CapFilt")
    c.box(20, 60, 120, 60, "web pairs\n(image, text)", GREY)
    c.box(200, 20, 150, 60, "captioner\nencode, K/V once", BLUE)
    c.box(410, 60, 150, 60, "filter\nencode, K/V once", GREEN)
    c.box(620, 60, 120, 60, "kept pairs\nas shards", ORANGE)
    c.arrow(142, 80, 196, 55)
    c.arrow(142, 100, 406, 100)
    c.arrow(352, 50, 406, 76)
    c.arrow(562, 90, 616, 90)
    c.note(200, 98, "web text")
    c.note(362, 46, "caption")
    c.box(200, 150, 150, 40, "captions/", GREY)
    c.box(410, 150, 150, 40, "scores/", GREY)
    c.box(620, 150, 120, 40, "manifest.jsonl", GREY)
    for x in (275, 485, 680):
        c.arrow(x, 124 if x != 275 else 84, x, 148, dashed=True)
    c.note(
        20,
        222,
        "A unit of images is saved whole or not at all, whoever "
        "worked on it: one process, a rank, or Ray.",
    )
    return c.svg()


PICTURES: dict[str, Callable[[], str]] = {
    "packed-pass": packed_pass,
    "cross-attention": cross_attention,
    "dense-attention": dense_attention,
    "contrastive": contrastive,
    "hard-negatives": hard_negatives,
    "linear-ce": linear_ce,
    "add-layer-norm": add_layer_norm,
    "capfilt": capfilt,
}
