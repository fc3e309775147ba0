"""Draws docs/images/method-light.svg and method-dark.svg, which show the method."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent / "images"
THEMES = {
    "light": {"ink": "#1f2328", "quiet": "#59636e", "line": "#818b98", "box": "#f6f8fa",
              "model": "#ddf4ff", "frozen": "#fff8c5", "good": "#1a7f37", "bad": "#cf222e"},
    "dark": {"ink": "#f0f6fc", "quiet": "#9198a1", "line": "#656c76", "box": "#151b23",
             "model": "#12305a", "frozen": "#3a2d09", "good": "#3fb950", "bad": "#f85149"},
}  # fmt: skip


def text(x: float, y: float, words: str, fill: str, size: int = 14, weight: int = 400) -> str:
    words = words.replace("&", "&amp;").replace("<", "&lt;")
    return (
        f'<text x="{x}" y="{y}" fill="{fill}" font-size="{size}" font-weight="{weight}" '
        f'text-anchor="middle">{words}</text>'
    )


def box(x: int, y: int, w: int, h: int, lines: list[str], fill: str, c: dict[str, str]) -> str:
    parts = [
        f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="8" fill="{fill}" '
        f'stroke="{c["line"]}" stroke-width="1.2"/>'
    ]
    top = y + h / 2 - 9 * (len(lines) - 1) + 5
    for i, line in enumerate(lines):
        ink, weight, size = (c["ink"], 600, 14) if i == 0 else (c["quiet"], 400, 12)
        parts.append(text(x + w / 2, top + 18 * i, line, ink, size, weight))
    return "".join(parts)


def arrow(path: str, c: dict[str, str]) -> str:
    return (
        f'<path d="{path}" fill="none" stroke="{c["line"]}" stroke-width="1.6" '
        'marker-end="url(#head)"/>'
    )


def drawing(c: dict[str, str]) -> str:
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 920 330" role="img" '
        'font-family="ui-sans-serif, -apple-system, Segoe UI, Helvetica, Arial, sans-serif">',
        "<title>SELF-JUDGE: one model learns to answer and to judge, learns from its own judged "
        "answers, and picks the best of N</title>",
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        f'markerHeight="7" orient="auto"><path d="M0 0L8 4L0 8z" fill="{c["line"]}"/></marker>',
        "</defs>",
        text(145, 24, "1  JSFT", c["ink"], 15, 600),
        text(520, 24, "2  Self-training, on-policy", c["ink"], 15, 600),
        text(830, 24, "3  Self-rejection", c["ink"], 15, 600),
        box(
            20,
            50,
            250,
            64,
            ["Preference data", "question, better answer, worse answer"],
            c["box"],
            c,
        ),
        arrow("M95 114V150", c),
        arrow("M195 114V150", c),
        text(60, 137, "answers", c["quiet"], 12),
        text(256, 137, "pairs, both orders", c["quiet"], 12),
        box(20, 152, 250, 70, ["One language model", "answers, and says A or B"], c["model"], c),
        text(125, 250, "“Which is better, A or B?”  →  “A”", c["quiet"], 12),
        arrow("M270 187H320", c),
        box(322, 152, 118, 70, ["Policy", "starts here"], c["model"], c),
        box(322, 256, 118, 54, ["Frozen copy", "judge, reference"], c["frozen"], c),
        arrow("M252 222V283H320", c),
        arrow("M440 187H490", c),
        text(465, 178, "sample", c["quiet"], 12),
        box(492, 152, 96, 70, ["y, y′", "two answers"], c["box"], c),
        arrow("M588 187H636", c),
        box(638, 152, 92, 70, ["Verdict", "y ≻ y′"], c["box"], c),
        arrow("M440 283H684V224", c),
        text(560, 276, "judges both orders", c["quiet"], 12),
        arrow("M684 152V90H381V150", c),
        text(532, 82, "DPO loss updates the policy", c["quiet"], 12),
        box(760, 50, 140, 40, ["N answers"], c["box"], c),
        arrow("M830 90V112", c),
        box(760, 114, 140, 130, [], c["box"], c),
    ]
    # A bracket with four answers.
    for y in (134, 162, 190, 218):
        parts.append(f'<path d="M776 {y}H802" stroke="{c["line"]}" stroke-width="1.6"/>')
    for top, bottom in ((134, 162), (190, 218)):
        middle = (top + bottom) / 2
        parts.append(
            f'<path d="M802 {top}V{bottom}M802 {middle}H836" stroke="{c["line"]}" '
            'stroke-width="1.6" fill="none"/>'
        )
    parts.append(
        f'<path d="M836 148V204M836 176H868" stroke="{c["line"]}" stroke-width="1.6" fill="none"/>'
        f'<circle cx="876" cy="176" r="7" fill="{c["good"]}"/>'
    )
    parts += [
        text(830, 264, "a knockout of own", c["quiet"], 12),
        text(830, 281, "judgments: the best", c["quiet"], 12),
        "</svg>\n",
    ]
    return "".join(parts)


def main() -> None:
    for theme, colours in THEMES.items():
        (FOLDER / f"method-{theme}.svg").write_text(drawing(colours), encoding="utf-8")


if __name__ == "__main__":
    main()
