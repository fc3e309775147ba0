"""What a report's page carries."""

from __future__ import annotations

import json
import re
from typing import Any


def embedded(html: str) -> Any:
    (block,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', html)
    return json.loads(block)
