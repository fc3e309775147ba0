"""Draws docs/images/serving.svg: a request to `self-judge serve`, its bracket and its metrics.

self-judge demo --output outputs/demo
self-judge serve outputs/demo/jsft --policy outputs/demo/self_judge
python docs/serving_picture.py
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.text import Text

URL = "http://127.0.0.1:8000"
PICTURE = Path(__file__).parent / "images" / "serving.svg"
ASKED = "Now tell me: What does the otter eat? End with Thanks."
COUNTED = ("rounds_total", "comparisons_total", "comparisons_orders_agree_total")


def main() -> None:
    """Asks the running server, and draws what it answers."""
    name = httpx.get(f"{URL}/v1/models").json()["data"][0]["id"]
    body: dict[str, Any] = {
        "model": f"{name}:best-of-4",
        "messages": [{"role": "user", "content": ASKED}],
        "max_tokens": 48,
        "seed": 7,
        "self_judge": {"brackets": True},
    }
    answer = httpx.post(f"{URL}/v1/chat/completions", json=body, timeout=300).json()
    page = httpx.get(f"{URL}/metrics").text
    console = Console(record=True, width=96, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(Text("POST /v1/chat/completions", "bold"), f'"model": "{body["model"]}"')
    console.print(f'  user: "{ASKED}"\n', highlight=False)
    beside = answer["self_judge"]
    for k, text in enumerate(beside["responses"]):
        style = "bold green" if k == beside["winner"] else "default"
        console.print(Text(f"  {k}  {text}", style), soft_wrap=False)
    console.print()
    for number, matches in enumerate(beside["bracket"], start=1):
        for match in matches:
            if match["b"] is None or not match["probabilities"]:
                continue
            first, second = (
                sum(orders[i][j] for orders in match["probabilities"]) / len(match["probabilities"])
                for i, j in ((0, 0), (1, 1))
            )
            console.print(
                f"  round {number}: {match['a']} against {match['b']}: p({match['a']}) = "
                f"{first:.2f} when shown first, {second:.2f} when second; "
                f"{match['winner']} advances",
                highlight=False,
            )
    content = answer["choices"][0]["message"]["content"]
    console.print(Text(f"\n  assistant: {content}", "bold green"))
    console.print(f"  usage: {answer['usage']['completion_tokens']} tokens; sampled: "
                  f"{beside['sampled_tokens']}", highlight=False)  # fmt: skip
    console.print(Text("\nGET /metrics", "bold"))
    for counter in COUNTED:
        found = re.search(rf"^self_judge_{counter} (\S+)$", page, re.MULTILINE)
        console.print(f"  self_judge_{counter} {found[1] if found else 0}", highlight=False)
    svg = console.export_svg(title="self-judge serve")
    svg = re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL)  # no fonts from elsewhere
    PICTURE.write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main()
