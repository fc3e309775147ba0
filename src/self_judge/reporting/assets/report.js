// Draws the report from the data inside the page. Text from the data is used only in text nodes and
// in Plotly labels. Plotly interprets some markup in labels, so `plain` escapes the text.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const main = document.getElementById("main");
  const root = document.documentElement;
  const PAGE = 10; // pairs shown at a time
  const DASHES = ["solid", "dash", "dot", "dashdot"];
  const BORDERS = ["solid", "dashed", "dotted", "dashed"];

  // -- helpers -----------------------------------------------------------------------------------

  function el(tag, attributes, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes || {})) {
      if (value === undefined || value === null || value === false) continue;
      if (name === "on") for (const [event, f] of Object.entries(value)) node.addEventListener(event, f);
      else if (name === "style") Object.assign(node.style, value);
      else node.setAttribute(name, value === true ? "" : value);
    }
    for (const child of children.flat(9)) {
      if (child === undefined || child === null || child === false) continue;
      node.append(child instanceof Node ? child : document.createTextNode(String(child)));
    }
    return node;
  }

  const css = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const color = (i) => `var(--run-${i % 8})`;
  const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  // A long path or name may break after a slash or an underscore.
  const breakable = (name) => name.split(/(?<=[/_])/).flatMap((part) => [part, el("wbr")]);
  const known = (x) => x !== undefined && x !== null;
  const count = (n, noun) => `${n.toLocaleString("en")} ${noun}${n === 1 ? "" : "s"}`;

  function number(x, format) {
    if (!known(x)) return "–";
    if (format === "percent") return `${(100 * x).toFixed(Math.abs(x) < 0.0995 && x !== 0 ? 1 : 0)}%`;
    if (format === "change") return `${x >= 1 ? "+" : "−"}${Math.abs(100 * (x - 1)).toFixed(0)}%`;
    const size = Math.abs(x);
    if (Number.isInteger(x) && size < 1e7) return x.toLocaleString("en");
    if (size !== 0 && (size < 1e-3 || size >= 1e5)) return x.toExponential(1);
    return x.toFixed(size >= 100 ? 0 : size >= 10 ? 1 : size >= 1 ? 2 : 3);
  }

  function section(id, title, about, ...children) {
    document.getElementById("nav").append(el("a", { href: `#${id}` }, title));
    const node = el("section", { id, "aria-labelledby": `${id}-title` },
      el("h2", { id: `${id}-title` }, title), about && el("p", { class: "muted" }, about), children);
    main.append(node);
    return node;
  }

  const labelled = (text, control, className) => el("label", { class: className }, text, control);
  const options = (select, pairs) => {
    for (const [value, text] of pairs) select.append(el("option", { value }, text));
    return select;
  };

  // Functions that show the pair or the tournament with an id, and return whether there is one.
  const finders = [];

  const link = (id, what) => el("a", { href: `#${id}`, class: "link", "aria-label": `link to this ${what}` }, "link");

  function openLinked() {
    const id = location.hash.slice(1);
    document.querySelector(".linked")?.classList.remove("linked");
    if (!finders.some((find) => find(id))) return;
    const node = document.getElementById(id);
    node.classList.add("linked");
    node.scrollIntoView();
  }

  // -- runs --------------------------------------------------------------------------------------

  const shown = data.runs.map(() => true);
  let smoothing = 0;
  const drawings = []; // redrawn when the theme, the smoothing or the shown runs change
  const redraw = () => drawings.forEach((draw) => draw());

  const ends = (run, key) => {
    const values = ((run.series[key] || {}).value || []).filter(known);
    return values.length ? [values[0], values[values.length - 1]] : null;
  };

  const COLUMNS = [
    ["steps", (run) => {
      const steps = Object.values(run.series).flatMap((s) => s.step.slice(-1));
      return [number(Math.max(0, ...steps)), known(run.about.max_steps) ? `of ${number(run.about.max_steps)}` : ""];
    }],
    ["loss", "loss"], ["judge margin", "judge/margin"],
    ["order agreement", "judge/order_agreement", "percent"],
    ["undecidable", "judge/undecidable", "percent"],
    ["tokens", "completions/mean_length"],
    ["length drift", "completions/length_drift", "change"], ["KL", "objective/kl"],
  ];

  // One row per item, in the item's color. On a phone, each row is a card. Columns:
  // title, item → contents.
  function cardTable(heading, things, columns, classOf = () => "number", dots = true) {
    return el("div", { class: "scroll" }, el("table", { class: "cards" },
      el("thead", {}, el("tr", {}, el("th", { scope: "col" }, heading), columns.map(([title]) => el("th", { scope: "col", class: "number" }, title)))),
      el("tbody", {}, things.map((thing, i) => el("tr", {},
        el("th", { scope: "row" }, el("span", { class: "name" }, dots && el("span", { class: "dot", style: { background: color(i) } }), el("span", {}, breakable(thing.name)))),
        columns.map(([title, contents]) => {
          const inside = contents(thing);
          return el("td", { class: classOf(inside), "data-label": title }, inside);
        }))))));
  }

  // A share with its interval.
  const ranged = (e) => (e ? [number(e.value, "percent"), el("small", {}, `${number(e.ci95[0], "percent")} – ${number(e.ci95[1], "percent")}`)] : "–");

  function runsTable() {
    const has = COLUMNS.filter(([, key]) => typeof key === "function" || data.runs.some((r) => ends(r, key)));
    const contents = (key, format) => (run) => {
      let text, small;
      if (typeof key === "function") [text, small] = key(run);
      else {
        const both = ends(run, key);
        text = both ? number(both[1], format) : "–";
        small = both && format !== "change" ? `from ${number(both[0], format)}` : "";
      }
      return [text, small && el("small", {}, small)];
    };
    return cardTable("run", data.runs, has.map(([title, key, format]) => [title, contents(key, format)]),
      ([text]) => (text === "–" ? "number none" : "number"));
  }

  // -- charts ------------------------------------------------------------------------------------

  function smoothed(values) {
    let mean = 0, weight = 0;
    return values.map((v) => {
      if (!known(v)) return null;
      mean = smoothing * mean + (1 - smoothing) * v;
      weight = smoothing * weight + (1 - smoothing);
      return mean / weight;
    });
  }

  function layout(spec, more) {
    const axis = {
      gridcolor: css("--line"), zerolinecolor: css("--line"), linecolor: css("--line"),
      tickfont: { size: 11, color: css("--muted") }, automargin: true, fixedrange: false,
    };
    return {
      autosize: true, margin: { l: 44, r: 8, t: 8, b: 34 },
      // This color is opaque, because Plotly outlines the line at the pointer with it.
      paper_bgcolor: css("--paper"), plot_bgcolor: css("--paper"),
      font: { family: getComputedStyle(document.body).fontFamily, color: css("--ink"), size: 12 },
      xaxis: { ...axis, showgrid: false, title: { text: "step", font: { size: 11, color: css("--muted") }, standoff: 4 }, tickformat: "d", nticks: 7,
        spikecolor: css("--muted"), spikethickness: 1, spikedash: "solid", unifiedhovertitle: { text: "step %{x}" } },
      yaxis: { ...axis, nticks: 6, ...(spec.format === "percent" ? { tickformat: ".0%", minallowed: -0.02, maxallowed: 1.02 } : {}),
        ...(spec.log ? { type: "log" } : {}), ...(spec.range ? { range: spec.range } : {}) },
      hovermode: "x unified", showlegend: false,
      hoverlabel: { bgcolor: css("--panel"), bordercolor: css("--line"), font: { color: css("--ink"), size: 12 } },
      shapes: known(spec.reference) ? [{ type: "line", xref: "paper", x0: 0, x1: 1, y0: spec.reference,
        y1: spec.reference, line: { color: css("--muted"), width: 1, dash: "dot" } }] : [],
      ...more,
    };
  }

  const CONFIG = { responsive: true, displaylogo: false, displayModeBar: false };

  function chart(spec, runs, lines) {
    const plot = el("div", { class: "plot", role: "img" });
    const keys = el("div", { class: "keys" });
    const figure = el("figure", { class: "chart", "data-chart": spec.id },
      el("figcaption", {}, el("h4", {}, spec.title), el("p", {}, spec.about)), plot, keys);
    const byLine = runs.length === 1;
    const several = lines.length > 1;
    drawings.push(() => {
      const traces = [];
      const said = [];
      const drawn = new Set();
      runs.forEach((run) => {
        const place = data.runs.indexOf(run);
        if (!shown[place]) return;
        lines.forEach(({ key, label }, j) => {
          const series = run.series[key];
          if (!series) return;
          drawn.add(j);
          const ink = css(`--run-${(byLine ? place + j : place) % 8}`);
          const name = plain([runs.length > 1 || !several ? run.name : "", several ? label : ""].filter(Boolean).join(" · "));
          const line = { color: ink, width: 1.8, dash: byLine ? "solid" : DASHES[j % 4] };
          const mode = series.step.length < 2 ? "markers" : "lines";
          const format = spec.format === "percent" ? "%{y:.1%}" : "%{y:.4g}";
          if (smoothing > 0) traces.push({ x: series.step, y: series.value, mode, line: { ...line, width: 1 }, opacity: 0.25, hoverinfo: "skip" });
          traces.push({ x: series.step, y: smoothing > 0 ? smoothed(series.value) : series.value, mode, line,
            marker: { color: ink }, name, hovertemplate: format, connectgaps: false });
          const values = series.value.filter(known);
          if (values.length) said.push(`${run.name}${several ? `, ${label}` : ""}: ${number(values[0], spec.format)} at the start, ${number(values[values.length - 1], spec.format)} at the end`);
        });
      });
      keys.replaceChildren(...(several ? lines.filter((_, j) => drawn.has(j)).map(({ label }) => {
        const j = lines.findIndex((l) => l.label === label);
        const place = data.runs.indexOf(runs[0]);
        return el("span", {}, el("i", { style: byLine ? { borderColor: color(place + j) } : { borderTopStyle: BORDERS[j % 4], borderColor: "var(--muted)" } }), label);
      }) : []));
      plot.setAttribute("aria-label", `${spec.title}. ${said.join("; ") || "nothing shown"}.`);
      const drawing = layout(spec);
      // Otherwise, a few steps get ticks between them, whose rounded labels repeat.
      if (traces.every(({ x }) => x[x.length - 1] < 8)) drawing.xaxis.dtick = 1;
      Plotly.react(plot, traces, drawing, CONFIG);
    });
    return figure;
  }

  function linesOf(spec, runs) {
    if (!spec.prefix) return spec.lines.filter(({ key }) => runs.some((r) => r.series[key]));
    const keys = [...new Set(runs.flatMap((r) => Object.keys(r.series)))].filter((k) => k.startsWith(spec.prefix)).sort();
    return keys.map((key) => ({ key, label: key.slice(spec.prefix.length) }));
  }

  function charts() {
    if (!data.runs.length) return;
    const chips = el("fieldset", { class: "chips" }, el("legend", {}, "runs"), data.runs.map((run, i) => {
      const chip = el("button", { type: "button", class: "chip", "aria-pressed": "true" },
        el("span", { class: "dot", style: { background: color(i) } }), run.name);
      chip.addEventListener("click", () => {
        shown[i] = !shown[i];
        chip.setAttribute("aria-pressed", String(shown[i]));
        redraw();
      });
      return chip;
    }));
    const output = el("output", {}, "0");
    const range = el("input", { type: "range", min: 0, max: 0.95, step: 0.05, value: 0, on: { input: () => {
      smoothing = Number(range.value);
      output.textContent = range.value;
      redraw();
    } } });
    const node = section("curves", "Curves", "The metrics logged during training. A dotted line marks a reference value; hover to see numbers.",
      el("div", { class: "controls" }, chips, labelled(el("span", {}, "smoothing ", output), range)));
    const used = new Set();
    for (const group of data.charts) {
      const runs = data.runs.filter((r) => r.kind === group.kind);
      const figures = [];
      for (const spec of group.charts) {
        const lines = linesOf(spec, runs);
        lines.forEach(({ key }) => used.add(`${group.kind} ${key}`));
        if (lines.length) figures.push(chart(spec, runs.filter((r) => lines.some(({ key }) => r.series[key])), lines));
      }
      if (figures.length) node.append(el("h3", {}, group.title), el("div", { class: "charts" }, figures));
    }
    const others = [...new Set(data.runs.flatMap((r) => Object.keys(r.series).filter((k) => !used.has(`${r.kind} ${k}`) && r.series[k].step.length > 1)))].sort();
    if (others.length) {
      const box = el("div", { class: "charts" });
      const details = el("details", {}, el("summary", {}, `All other numbers (${others.length})`), box);
      details.addEventListener("toggle", () => {
        if (!details.open || box.childNodes.length) return;
        const before = drawings.length;
        for (const key of others) {
          const runs = data.runs.filter((r) => r.series[key]);
          box.append(chart({ id: key, title: key, about: "" }, runs, [{ key, label: key }]));
        }
        drawings.slice(before).forEach((draw) => draw());
      });
      node.append(details);
    }
  }

  // -- a verdict in both orders ------------------------------------------------------------------

  function bar(p, forRejected) {
    return el("span", { class: "bar" }, known(p) ? p.toFixed(4) : "–",
      el("i", { class: forRejected ? "to-rejected" : "", "aria-hidden": "true" },
        el("b", { style: { width: `${100 * Math.min(1, p || 0)}%` } })));
  }

  function verdictTable(probabilities, principles, first, second) {
    if (!probabilities || !probabilities.length) return null;
    const several = probabilities.length > 1;
    const prefers = (a, b) => (a > b ? first : b > a ? second : "neither");
    return el("div", { class: "scroll" }, el("table", { class: "verdict" },
      el("thead", {}, el("tr", {}, several && el("th", { scope: "col" }, "principle"), el("th", { scope: "col" }, "shown first"),
        el("th", { scope: "col" }, "p(A)"), el("th", { scope: "col" }, "p(B)"), el("th", { scope: "col" }, "prefers"))),
      el("tbody", {}, probabilities.flatMap(([[aa, ab], [ba, bb]], i) => [
        el("tr", { class: several ? "first" : "" }, several && el("th", { scope: "row", rowspan: 2 }, (principles || [])[i] || `principle ${i + 1}`),
          el("td", {}, first), el("td", {}, bar(aa, false)), el("td", {}, bar(ab, true)), el("td", {}, prefers(aa, ab))),
        el("tr", {}, el("td", {}, second), el("td", {}, bar(ba, true)), el("td", {}, bar(bb, false)), el("td", {}, prefers(bb, ba))),
      ]))));
  }

  // -- pairs -------------------------------------------------------------------------------------

  function marked(text, needle) {
    if (!needle) return [text];
    const parts = [];
    const lower = text.toLowerCase();
    // Lowercase text can be longer than the original (İ). Indices then differ, so nothing is marked.
    if (lower.length !== text.length) return [text];
    let from = 0;
    for (let at = lower.indexOf(needle); at >= 0; at = lower.indexOf(needle, from)) {
      parts.push(text.slice(from, at), el("mark", {}, text.slice(at, at + needle.length)));
      from = at + needle.length;
    }
    return [...parts, text.slice(from)];
  }

  const OUTCOMES = {
    all: ["every pair", () => true],
    decided: ["decided", (p) => p.decided],
    undecidable: ["undecidable", (p) => !p.decided],
    orders: ["orders disagree", (p) => p.orders_agree === false],
    principles: ["principles disagree", (p) => {
      const sides = (p.probabilities || []).map(([[aa, ab], [ba, bb]]) => Math.sign(aa + bb - ab - ba));
      return sides.includes(1) && sides.includes(-1);
    }],
    cut: ["a response was cut", (p) => p.chosen_finished === false || p.rejected_finished === false],
  };
  const ORDERS = {
    step: ["step", (p, q) => p.step - q.step || p.run - q.run],
    late: ["step, latest first", (p, q) => q.step - p.step || p.run - q.run],
    close: ["margin, closest first", (p, q) => (known(p.margin) ? Math.abs(p.margin) : 9) - (known(q.margin) ? Math.abs(q.margin) : 9)],
    clear: ["margin, clearest first", (p, q) => (q.margin || 0) - (p.margin || 0)],
    longer: ["chosen longer first", (p, q) => (q.chosen_tokens - q.rejected_tokens) - (p.chosen_tokens - p.rejected_tokens)],
  };

  const said = (text, needle) => el("p", { class: "text" }, text === "" ? el("span", { class: "muted" }, "(empty)") : marked(text, needle));

  // The gold score of a response in words, which only the demo has.
  const goldOf = (score, reasons) => known(score) && el("p", { class: "gold" }, `gold ${score.toFixed(2)}`, reasons && `: ${reasons}`);

  function response(side, pair, needle) {
    const of = (name) => pair[`${side}_${name}`];
    return el("div", { class: side }, el("p", { class: "label" }, el("b", {}, side),
      known(of("tokens")) && ` · ${count(of("tokens"), "token")}`, of("finished") === false && ", cut at the limit"),
      said(pair[side], needle), goldOf(of("gold_score"), of("gold_reasons")));
  }

  // The ids depend only on the pairs, so that a link also works on a later page of the same run.
  const perId = new Map();
  for (const pair of data.pairs) {
    const id = `pair-${pair.run + 1}-${pair.step}-${pair.record}`;
    perId.set(id, (perId.get(id) || 0) + 1);
    pair.id = perId.get(id) > 1 ? `${id}-${perId.get(id)}` : id;
  }

  const runsWithPairs = new Set(data.pairs.map((p) => p.run)).size;

  function pairCard(pair, needle) {
    return el("article", { class: "pair", id: pair.id },
      el("header", {}, el("strong", {}, `step ${pair.step}`), el("span", {}, `prompt ${pair.record}`),
        runsWithPairs > 1 && el("span", { class: "name" }, el("span", { class: "dot", style: { background: color(pair.run) } }), data.runs[pair.run].name),
        pair.decided ? el("span", {}, `margin ${number(pair.margin)}`) : el("span", { class: "tag bad" }, `undecidable: ${pair.undecidable_because}`),
        pair.orders_agree === false && el("span", { class: "tag bad" }, "orders disagree"),
        pair.orders_agree === true && el("span", { class: "tag" }, "orders agree"), link(pair.id, "pair")),
      el("div", { class: "context", tabindex: "0", role: "group", "aria-label": "context" }, el("p", { class: "label" }, "context"),
        el("p", { class: "text" }, marked(pair.context, needle))),
      el("div", { class: "two" }, response("chosen", pair, needle), response("rejected", pair, needle)),
      verdictTable(pair.probabilities, pair.principles, "chosen", "rejected"),
      pair.prompt && el("details", { class: "quiet" }, el("summary", {}, "the policy's prompt"), el("pre", {}, pair.prompt)));
  }

  function pairs() {
    if (!data.pairs.length) return;
    const runs = [...new Set(data.pairs.map((p) => p.run))];
    const steps = [...new Set(data.pairs.map((p) => p.step))].sort((a, b) => a - b);
    const pick = {
      run: options(el("select", {}), [["", "every run"], ...runs.map((r) => [r, data.runs[r].name])]),
      step: options(el("select", {}), [["", "every step"], ...steps.map((s) => [s, `step ${s}`])]),
      outcome: options(el("select", {}), Object.entries(OUTCOMES).map(([k, [text]]) => [k, text])),
      order: options(el("select", {}), Object.entries(ORDERS).map(([k, [text]]) => [k, text])),
    };
    const search = el("input", { type: "search", placeholder: "words in a context or a response", autocomplete: "off" });
    const status = el("p", { class: "muted", role: "status", "aria-live": "polite" });
    const list = el("div", {});
    const more = el("button", { type: "button" }, "Show more");
    let found = [];
    let until = 0;
    let needle = "";
    function extend() {
      const from = until;
      until = Math.min(found.length, until + PAGE);
      list.append(...found.slice(from, until).map((p) => pairCard(p, needle)));
      more.hidden = until >= found.length;
    }
    function filter() {
      needle = search.value.trim().toLowerCase();
      const outcome = OUTCOMES[pick.outcome.value][1];
      found = data.pairs.filter((p) => (pick.run.value === "" || p.run === Number(pick.run.value)) &&
        (pick.step.value === "" || p.step === Number(pick.step.value)) && outcome(p) &&
        (!needle || [p.context, p.chosen, p.rejected].some((t) => t.toLowerCase().includes(needle))));
      found.sort(ORDERS[pick.order.value][1]);
      until = 0;
      list.replaceChildren();
      status.textContent = `${found.length.toLocaleString("en")} of ${count(data.pairs.length, "pair")}`;
      if (!found.length) list.append(el("p", { class: "empty" }, "No pairs match. Change the filters or the search."));
      extend();
    }
    more.addEventListener("click", extend);
    search.addEventListener("input", filter);
    Object.values(pick).forEach((select) => select.addEventListener("change", filter));
    section("pairs", "Pairs", "Pairs that the policy sampled, with the judge's probability of each letter in both orders. The better response should win under either letter.",
      el("div", { class: "controls" }, labelled("search", search, "grow"), runs.length > 1 && labelled("run", pick.run),
        labelled("step", pick.step), labelled("outcome", pick.outcome), labelled("sorted by", pick.order)),
      status, list, more);
    filter();
    finders.push((id) => {
      const pair = data.pairs.find((p) => p.id === id);
      if (!pair) return false;
      if (!found.includes(pair)) {
        search.value = "";
        Object.values(pick).forEach((select) => { select.selectedIndex = 0; });
        filter();
      }
      while (found.indexOf(pair) >= until) extend();
      return true;
    });
  }

  // -- tournaments -------------------------------------------------------------------------------

  function swapAveraged(probabilities) {
    if (!probabilities || !probabilities.length) return [null, null];
    const mean = (f) => probabilities.reduce((sum, p) => sum + f(p), 0) / probabilities.length;
    return [mean(([[aa], [, bb]]) => (aa + bb) / 2), mean(([[, ab], [ba]]) => (ab + ba) / 2)];
  }

  function bracketTree(bracket, open) {
    const text = (i) => bracket.responses[i].replace(/\s+/g, " ") || "(empty)";
    const entrant = (i, won, score) => el("span", { class: won ? "won" : "" }, el("span", {}, `${i + 1}`),
      el("span", { class: "said" }, text(i)), el("span", { class: "score" }, known(score) ? score.toFixed(2) : ""));
    function match(m) {
      if (!known(m.b)) return el("div", { class: "match" }, entrant(m.a, true, null), el("span", {}, el("span", { class: "by" }, "bye")));
      const [a, b] = swapAveraged(m.probabilities);
      const button = el("button", { type: "button", class: "match", "aria-expanded": "false",
        "aria-label": `response ${m.a + 1} against ${m.b + 1}, won by ${m.winner + 1}${m.by_lot ? ", by lot" : ""}` },
        entrant(m.a, m.winner === m.a, a), entrant(m.b, m.winner === m.b, b),
        m.by_lot && el("span", {}, el("span", { class: "by" }, "undecidable: drawn by lot")));
      button.addEventListener("click", () => open(m, button));
      return button;
    }
    // A match is preceded by the matches of the previous round that its entrants won.
    function node(round, place) {
      const m = bracket.rounds[round][place];
      const before = round ? [m.a, m.b].filter(known).map((i) => bracket.rounds[round - 1].findIndex((won) => won.winner === i)).filter((k) => k >= 0) : [];
      return el("div", { class: "node" }, before.length > 0 && el("div", { class: "feeds" }, before.map((k) => node(round - 1, k))), match(m));
    }
    return el("div", { class: "bracket" }, node(bracket.rounds.length - 1, 0));
  }

  function tournaments() {
    const played = data.brackets.filter((b) => b.rounds.length);
    if (!played.length) return;
    const box = el("div", {});
    const select = options(el("select", { style: { width: "100%" } }), played.map((b, i) => {
      const said = b.context.replace(/\s+/g, " ");
      return [i, `${i + 1}. ${said.length > 90 ? `${said.slice(0, 90)} …` : said}`];
    }));
    const step = (by) => {
      select.value = String((Number(select.value) + by + played.length) % played.length);
      show();
    };
    function show() {
      const bracket = played[Number(select.value)];
      const detail = el("div", { "aria-live": "polite" });
      let opened = null;
      const gold = (i) => bracket.gold_scores && goldOf(bracket.gold_scores[i], (bracket.gold_reasons || [])[i]);
      const side = (i, name, className) => el("div", { class: className }, el("p", { class: "label" }, el("b", {}, bracket.prior ? `${name} · prior ${bracket.prior[i].toFixed(2)}` : name)), said(bracket.responses[i]), gold(i));
      const open = (m, button) => {
        const same = opened === button;
        if (opened) opened.setAttribute("aria-expanded", "false");
        opened = same ? null : button;
        detail.replaceChildren();
        if (same) return;
        button.setAttribute("aria-expanded", "true");
        const lost = m.winner === m.a ? m.b : m.a;
        const probabilities = m.winner === m.a ? m.probabilities : (m.probabilities || []).map(([first, second]) => [second, first]);
        detail.append(el("div", { class: "detail" }, el("div", { class: "two" },
          side(m.winner, `response ${m.winner + 1}, advanced`, "chosen"), side(lost, `response ${lost + 1}`, "rejected")),
          verdictTable(probabilities, bracket.principles, `response ${m.winner + 1}`, `response ${lost + 1}`) ||
            el("p", { class: "muted" }, "There are no probabilities, because the texts are equal, the pair is too long, or a thought has no answer."),
          bracket.prior && el("p", { class: "muted" }, "The difference of the priors is added to the judge's log odds.")));
        detail.scrollIntoView({ block: "nearest" });
      };
      box.classList.remove("linked");
      box.id = `tournament-${Number(select.value) + 1}`;
      box.replaceChildren(
        el("div", { class: "context" }, el("p", { class: "label" }, "context ", link(box.id, "tournament")), el("p", { class: "text" }, bracket.context)),
        el("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": "bracket" },
          bracketTree(bracket, open)),
        detail,
        el("h3", {}, `winner: response ${bracket.winner + 1}`), said(bracket.responses[bracket.winner]), gold(bracket.winner));
    }
    select.addEventListener("change", show);
    section("tournaments", "Tournaments", "The matches between a model's own responses, with their swap-averaged scores. Select a match to see both texts and the judge's probabilities.",
      el("div", { class: "controls" }, labelled("context", select, "grow"),
        el("div", { class: "chips" }, el("button", { type: "button", on: { click: () => step(-1) } }, "Previous"),
          el("button", { type: "button", on: { click: () => step(1) } }, "Next"))), box);
    show();
    finders.push((id) => {
      const at = played.findIndex((_, i) => id === `tournament-${i + 1}`);
      if (at < 0) return false;
      select.value = String(at);
      show();
      return true;
    });
  }

  // -- the judge ---------------------------------------------------------------------------------

  function judges() {
    if (!data.judges.length) return;
    const drawn = data.judges.map((judge, i) => ({ ...judge, i, bins: ((judge.calibration || {}).bins || []).filter((b) => b.n) }))
      .filter((judge) => judge.bins.length);
    const plot = el("div", { class: "plot reliability", role: "img" });
    if (drawn.length) drawings.push(() => {
      const ink = (i) => css(`--run-${i % 8}`);
      const traces = drawn.flatMap(({ name, i, bins }) => [
        { x: bins.map((b) => b.confidence), y: bins.map((b) => b.accuracy.value), mode: "lines+markers", name: plain(name),
          line: { color: ink(i), width: 1.8 }, marker: { color: ink(i), size: 7 },
          error_y: { type: "data", symmetric: false, array: bins.map((b) => b.accuracy.ci95[1] - b.accuracy.value),
            arrayminus: bins.map((b) => b.accuracy.value - b.accuracy.ci95[0]), color: ink(i), thickness: 1, width: 3 },
          customdata: bins.map((b) => b.n), hovertemplate: "confidence %{x:.0%}, accuracy %{y:.0%}, %{customdata} verdicts<extra></extra>" },
        { x: bins.map((b) => (b.low + b.high) / 2), y: bins.map((b) => b.n), width: bins.map((b) => 0.8 * (b.high - b.low)), type: "bar",
          yaxis: "y2", marker: { color: ink(i), opacity: 0.55 }, name: plain(name), hovertemplate: "%{y} verdicts<extra></extra>" },
      ]);
      const base = layout({});
      const small = { size: 11, color: css("--muted") };
      Plotly.react(plot, traces, layout({}, {
        margin: { l: 56, r: 8, t: 8, b: 40 }, hovermode: "closest", barmode: "overlay",
        xaxis: { ...base.xaxis, title: { text: "confidence in the preferred response", font: small, standoff: 6 }, range: [Math.min(0.49, ...drawn.flatMap((j) => j.bins.map((b) => b.confidence - 0.01))), 1.01], tickformat: ".0%" },
        yaxis: { ...base.yaxis, domain: [0.3, 1], title: { text: "accuracy", font: small }, tickformat: ".0%", range: [-0.02, 1.05] },
        yaxis2: { ...base.yaxis, domain: [0, 0.2], title: { text: "verdicts", font: small }, tickformat: "d", nticks: 3, rangemode: "tozero" },
        shapes: [{ type: "line", x0: 0.5, y0: 0.5, x1: 1, y1: 1, xref: "x", yref: "y", line: { color: css("--muted"), width: 1, dash: "dot" } }],
      }), CONFIG);
    });
    plot.setAttribute("aria-label", `Reliability diagram. ${drawn.map((j) => `${j.name}: ${j.bins.map((b) => `confidence ${number(b.confidence, "percent")}, accuracy ${number(b.accuracy.value, "percent")}`).join(", ")}`).join("; ")}.`);
    const has = (columns) => columns.filter(([, , of]) => !of || data.judges.some((j) => known(of(j))));
    const share = (title, of) => [title, (j) => ranged(of(j)), of];
    const longer = (key) => (j) => (j.longer || {})[key];
    const columns = has([
      ["pairs", (j) => number(j.pairs)], share("accuracy", (j) => j.accuracy), share("orders agree", (j) => j.order_agreement),
      ["undecidable", (j) => number(j.undecidable, "percent")],
      ["p(A) + p(B)", (j) => number(j.letter_mass), (j) => j.letter_mass],
      ["calibration error", (j) => number((j.calibration || {}).ece)], ["Brier score", (j) => number((j.calibration || {}).brier)],
    ]);
    const biases = has([
      share("decided by position", (j) => j.decided_by_position), share("first position wins", (j) => j.first_position),
      share("longer preferred", longer("preferred")), share("accuracy, better is longer", longer("accuracy_better_is_longer")),
      share("accuracy, better is shorter", longer("accuracy_better_is_shorter")),
    ]);
    const principles = [...new Set(data.judges.flatMap((j) => Object.keys(j.principles || {})))];
    const alone = has(principles.map((name) => share(name, (j) => (j.principles || {})[name])));
    const paired = [
      ["difference in accuracy", (p) => ranged(p.difference)], ["only this judge right", (p) => number(p.only_this_right)],
      ["only the other judge right", (p) => number(p.only_other_right)], ["McNemar’s p", (p) => number(p.mcnemar_p)],
    ];
    const table = (title, things, shown) => things.length > 0 && shown.length > 0 && [el("h3", {}, title), cardTable("judge", things, shown)];
    section("judge", "Judge", "Results on labeled pairs. On the dotted line, the judge's confidence equals its accuracy; below it, the judge is overconfident. Bars and ranges are 95% intervals.",
      drawn.length > 0 && plot,
      cardTable("judge", data.judges, columns),
      data.benchmarks.map(({ name, rows, unpaired }) => {
        const metrics = [...new Set(rows.flatMap((row) => Object.keys(row.metrics)))];
        return [el("h4", {}, breakable(name)), cardTable("subset", rows, metrics.map((m) => [m, (row) => ranged(row.metrics[m])]), undefined, false),
          unpaired && el("p", { class: "muted" }, `Ties: ${count(unpaired, "prompt")} without a counterpart do not count`)];
      }),
      baselines(),
      table("Position and length", data.judges, biases),
      alone.length > 1 && table("Accuracy of each principle alone", data.judges, alone),
      table("Against the other judge, pair by pair", data.paired, paired));
  }

  // The accuracy next to that of a single order and of the longer response.
  function baselines() {
    const rated = data.judges.filter((j) => Object.values(j.baselines || {}).some(known));
    if (!rated.length) return null;
    const names = Object.keys(rated[0].baselines);
    const plot = el("div", { class: "plot reliability baselines", role: "img" });
    drawings.push(() => {
      const base = layout({});
      Plotly.react(plot, names.map((name, i) => {
        const told = rated.filter((j) => known(j.baselines[name]));
        const shares = told.map((j) => j.baselines[name]);
        return {
          type: "bar", name: plain(name), x: told.map((j) => plain(j.name)), y: shares.map((e) => e.value),
          marker: { color: css(`--run-${i % 8}`), opacity: i ? 0.55 : 1 }, hovertemplate: "%{x}: %{y:.1%}",
          error_y: { type: "data", symmetric: false, array: shares.map((e) => e.ci95[1] - e.value),
            arrayminus: shares.map((e) => e.value - e.ci95[0]), color: css("--muted"), thickness: 1, width: 3 },
        };
      }), layout({}, {
        hovermode: "closest", barmode: "group", showlegend: true, legend: { orientation: "h", y: 1.02, yanchor: "bottom" },
        xaxis: { ...base.xaxis, type: "category", tickformat: "", title: { text: "" } },
        yaxis: { ...base.yaxis, range: [0, 1.05], tickformat: ".0%", title: { text: "accuracy", font: { size: 11, color: css("--muted") } } },
        shapes: [{ type: "line", xref: "paper", x0: 0, x1: 1, y0: 0.5, y1: 0.5, line: { color: css("--muted"), width: 1, dash: "dot" } }],
      }), CONFIG);
    });
    plot.setAttribute("aria-label", `Accuracy compared with baselines. ${rated.map((j) => `${j.name}: ${names.filter((n) => known(j.baselines[n])).map((n) => `${n} ${number(j.baselines[n].value, "percent")}`).join(", ")}`).join("; ")}.`);
    return [el("h3", {}, "Accuracy compared with a single order and with the longer response"), plot];
  }

  // -- policies compared -------------------------------------------------------------------------

  const RATES = [["win_rate", "win rate"], ["length_controlled_win_rate", "at equal length"], ["both_orders", "tie if orders disagree"], ["longer_wins_all", "if longer answers won"]];

  function policies() {
    if (!data.comparisons.length) return;
    const plot = el("div", { class: "plot", role: "img" });
    const of = (c, key) => (key === "both_orders" ? c.both_orders.win_rate : c[key]);
    drawings.push(() => {
      const base = layout({});
      Plotly.react(plot, data.comparisons.map((c, i) => {
        const rates = RATES.map(([key]) => of(c, key));
        return {
          x: rates.map((r) => r.value), y: RATES.map((_, row) => row + 0.16 * (i - (data.comparisons.length - 1) / 2)), mode: "markers", name: plain(c.name),
          text: RATES.map(([, label]) => label),
          marker: { color: css(`--run-${i % 8}`), size: 9 },
          error_x: { type: "data", symmetric: false, array: rates.map((r) => r.ci95[1] - r.value), arrayminus: rates.map((r) => r.value - r.ci95[0]),
            color: css(`--run-${i % 8}`), thickness: 1.6, width: 4 },
          hovertemplate: "%{text}: %{x:.1%}<extra></extra>",
        };
      }), layout({}, {
        margin: { l: 170, r: 12, t: 8, b: 40 }, hovermode: "closest", showlegend: false,
        xaxis: { ...base.xaxis, range: [0, 1.005], tickformat: ".0%", title: { text: "win rate of a", font: { size: 11, color: css("--muted") }, standoff: 6 } },
        yaxis: { ...base.yaxis, range: [RATES.length - 0.5, -0.5], tickvals: RATES.map((_, row) => row), ticktext: RATES.map(([, label]) => label) },
        shapes: [{ type: "line", x0: 0.5, x1: 0.5, y0: 0, y1: 1, xref: "x", yref: "paper", line: { color: css("--muted"), width: 1, dash: "dot" } }],
      }), CONFIG);
    });
    plot.setAttribute("aria-label", `Win rates. ${data.comparisons.map((c) => `${c.name}: ${RATES.map(([key, label]) => `${label} ${number(of(c, key).value, "percent")}`).join(", ")}`).join("; ")}.`);
    const columns = [["prompts", (c) => number(c.prompts)], ...RATES.map(([key, label]) => [label, (c) => ranged(of(c, key))]),
      ["wins / ties / losses", (c) => `${c.wins} / ${c.ties} / ${c.losses}`], ["orders agree", (c) => ranged(c.order_agreement)],
      ["characters, a / b", (c) => `${Math.round(c.characters.a.value)} / ${Math.round(c.characters.b.value)}`]];
    section("policies", "Policies compared", "Both policies answer the same prompts, and the judge decides which answer is better. Left of the dotted line, b wins. Ranges are 95% intervals; the last row of the chart is the result of always preferring the longer answer.",
      plot, cardTable("a against b", data.comparisons, columns), data.comparisons.map(answers));
  }

  const WINS = {
    all: ["every prompt", () => true],
    a: ["a wins", (p) => p.preferred === "a"],
    b: ["b wins", (p) => p.preferred === "b"],
    orders: ["orders disagree", (p) => p.orders_agree === false],
    undecidable: ["undecidable", (p) => !p.preferred],
  };

  // The answers of both policies, the first prompts first.
  function answers(comparison) {
    if (!comparison.pairs.length) return null;
    const pick = options(el("select", {}), Object.entries(WINS).map(([k, [text]]) => [k, text]));
    const status = el("p", { class: "muted", role: "status", "aria-live": "polite" });
    const list = el("div", {});
    const more = el("button", { type: "button" }, "Show more");
    const side = (pair, name, at) => el("div", { class: at ? "rejected" : "chosen" },
      el("p", { class: "label" }, el("b", {}, name), pair.preferred === name && " · preferred", pair.finished[at] === false && " · cut at the limit"), said(pair[name]));
    const card = (pair) => el("article", { class: "pair" },
      el("header", {}, el("strong", {}, `prompt ${pair.index + 1}`),
        pair.preferred ? el("span", {}, `margin ${number(Math.abs(pair.margin))}`) : el("span", { class: "tag bad" }, `undecidable: ${pair.undecidable_because}`),
        el("span", { class: pair.orders_agree ? "tag" : "tag bad" }, pair.orders_agree ? "orders agree" : "orders disagree")),
      el("div", { class: "context", tabindex: "0", role: "group", "aria-label": "context" }, el("p", { class: "label" }, "context"), said(pair.context)),
      el("div", { class: "two" }, side(pair, "a", 0), side(pair, "b", 1)),
      verdictTable(pair.probabilities, pair.principles, "a", "b"));
    let found = [];
    function extend() {
      const from = list.childElementCount;
      list.append(...found.slice(from, from + PAGE).map(card));
      more.hidden = list.childElementCount >= found.length;
    }
    function filter() {
      found = comparison.pairs.filter(WINS[pick.value][1]);
      status.textContent = `${found.length.toLocaleString("en")} of ${count(comparison.prompts, "prompt")}`;
      list.replaceChildren();
      extend();
    }
    more.addEventListener("click", extend);
    pick.addEventListener("change", filter);
    filter();
    return [el("h3", {}, `Answers of ${comparison.name}`), el("div", { class: "controls" }, labelled("outcome", pick)), status, list, more];
  }

  // -- gold scores of the demo -------------------------------------------------------------------

  function goldScores() {
    const score = ({ mean: m }) => [el("span", { class: "bar" }, m.mean.toFixed(3), el("i", { "aria-hidden": "true" }, el("b", { style: { width: `${100 * m.mean}%` } }))),
      el("small", {}, m.ci95.map((x) => x.toFixed(3)).join(" – "))];
    for (const { name, gold, win_rate_vs_jsft: wins, rubric, examples } of data.gold) {
      const rows = [["JSFT", gold.jsft], ["self-trained", gold.self_judge, wins],
        ...Object.entries(gold.self_judge_rejection).filter(([n]) => n !== "1").map(([n, e]) => [`self-trained, best of ${n}`, e]),
        ...Object.entries(gold.without_prior || {}).map(([n, e]) => [`best of ${n} by the judge alone`, e])]
        .map(([label, mean, rate]) => ({ name: label, mean, rate }));
      section("gold", data.gold.length > 1 ? `Gold scores of ${name}` : "Gold scores", `${rubric} The mean score on held-out prompts is between 0 and 1.`,
        cardTable("answers by", rows, [["gold score", score], ["win rate against JSFT", (r) => ranged(r.rate)]],
          (inside) => (inside === "–" ? "none" : ""), false),
        el("h3", {}, `The first ${examples.length} held-out prompts`),
        examples.map(({ prompt, answers }) => el("article", { class: "pair" }, el("div", { class: "context" }, said(prompt)),
          el("div", { class: "two three" }, answers.map((a) => el("div", {}, el("p", { class: "label" }, el("b", {}, a.by)), said(a.text), goldOf(a.gold_score, a.gold_reasons)))))));
    }
  }

  // -- conclusions -------------------------------------------------------------------------------

  function conclusions() {
    if (!data.conclusions.length) return;
    const about = [...new Set(data.conclusions.map((c) => c.about))];
    section("conclusions", "Conclusions", "The rules are in docs/judging.md. Red: do not use this result as it is. Amber: look closer.",
      about.map((name) => [el("h4", {}, breakable(name)), el("ul", { class: "conclusions" }, data.conclusions.filter((c) => c.about === name)
        .map((c) => el("li", { class: c.level }, el("b", {}, c.level), el("span", {}, c.text))))]));
  }

  // -- configuration -----------------------------------------------------------------------------

  function flattened(value, path, out) {
    if (value !== null && typeof value === "object" && !Array.isArray(value) && Object.keys(value).length) {
      for (const [key, inner] of Object.entries(value)) flattened(inner, path ? `${path}.${key}` : key, out);
    } else out.set(path, typeof value === "string" ? value : JSON.stringify(value));
    return out;
  }

  function comparison(title, of, open) {
    const settings = data.runs.map((run) => flattened(of(run) || {}, "", new Map()));
    const keys = [...new Set(settings.flatMap((s) => [...s.keys()]))].filter((k) => k !== "");
    if (!keys.length) return null;
    const several = data.runs.length > 1;
    const differs = (key) => several && new Set(settings.map((s) => s.get(key))).size > 1;
    const rows = keys.map((key) => el("tr", { class: differs(key) ? "differs" : "" }, el("th", { scope: "row" }, key),
      settings.map((s) => el("td", {}, known(s.get(key)) ? s.get(key) : "–"))));
    const only = el("input", { type: "checkbox", on: { change: () => rows.forEach((row) => {
      row.hidden = only.checked && !row.classList.contains("differs");
    }) } });
    return el("details", { open }, el("summary", {}, title),
      several && el("div", { class: "controls" }, el("label", { class: "check" }, only, "only differences")),
      el("div", { class: "scroll" }, el("table", { class: "settings" },
        several && el("thead", {}, el("tr", {}, el("th", { scope: "col" }, ""), data.runs.map((r) => el("th", { scope: "col" }, r.name)))),
        el("tbody", {}, rows))));
  }

  function configuration() {
    if (!data.runs.length) return;
    const about = (run) => {
      const { run_file, changed_arguments, arguments: all, versions, judge_templates, ...rest } = run.about;
      return { folder: run.folder, ...rest };
    };
    section("configuration", "Configuration", data.runs.length > 1 ? "Rows in bold differ between runs." : null,
      comparison("Run", about, true),
      comparison("Run file", (r) => r.about.run_file, false),
      comparison("Arguments that differ from the defaults", (r) => r.about.changed_arguments, false),
      comparison("Judge templates", (r) => r.about.judge_templates, false),
      comparison("Data", (r) => r.data, false),
      comparison("Versions", (r) => r.about.versions, false),
      comparison("All arguments", (r) => r.about.arguments, false));
  }

  // ----------------------------------------------------------------------------------------------

  const results = [...data.comparisons, ...(data.runs.length ? [] : data.judges.slice(0, 1))].map((thing) => thing.name);
  document.getElementById("made").textContent = [data.runs.length && count(data.runs.length, "run"),
    data.brackets.length && count(data.brackets.length, "tournament"),
    ...results, `created ${data.made}`].filter(Boolean).join(" · ");
  document.title = ["self-judge report", ...data.runs.map((r) => r.name), ...results].join(" · ");
  conclusions();
  goldScores();
  if (data.runs.length) section("runs", "Runs", "The last logged values, with the first logged values below them.", runsTable());
  if (data.notes.length) main.append(el("ul", { class: "notes" }, data.notes.map((note) => el("li", {}, note))));
  charts();
  pairs();
  tournaments();
  judges();
  policies();
  configuration();
  document.getElementById("footer").textContent = `self_judge ${data.version} · plotly.js ${Plotly.version} · this page does not load or send data over a network`;
  redraw();
  addEventListener("hashchange", openLinked);
  openLinked();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  root.dataset.ready = "true";
})();
