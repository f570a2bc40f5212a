"use strict";
/* The browser of decisions. Text from records reaches the page by `textContent` only, never as markup. */
(() => {
  const PAGE = 50;
  const LABELS = {
    all: "All", redundant: "Redundant calls", wrong_direct: "Wrong direct answers", missed: "Missed calls",
    harmful: "Calls that spoilt a known answer", wrong: "Wrong answers", failed: "Failed runs",
  };
  const BRANCHES = { free: "As deployed", direct: "Forced to answer", tool: "Forced to call" };
  const VERDICTS = ["wrong", "right", "not judged", "failed"];
  const find = (id) => document.getElementById(id);
  const numbers = new Intl.NumberFormat("en");

  /** Make an element; children are elements or texts. */
  function make(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (value === true) element.setAttribute(name, "");
      else if (value !== false && value !== undefined) element.setAttribute(name, value);
    }
    element.append(...children.filter((child) => child !== null && child !== undefined && child !== "")
      .flatMap((child) => typeof child === "string" ? breakable(child) : [child]));
    return element;
  }

  /** Seconds as a date; as they are where no calendar goes so far. */
  function dated(seconds) {
    const date = new Date(seconds * 1000);
    if (!seconds || isNaN(date)) return seconds ? `${seconds} s` : "";
    return date.toISOString().replace("T", " ").slice(0, 19) + " UTC";
  }

  /** A word of thousands of letters takes a browser minutes to lay out; with places to break it, no time. */
  function breakable(text) {
    return text.split(/(\S{100})(?=\S)/).filter(Boolean)
      .flatMap((piece, place) => place ? [document.createElement("wbr"), piece] : [piece]);
  }

  async function unpack(base64) {
    const bytes = Uint8Array.from(atob(base64.trim()), (character) => character.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return JSON.parse(await new Response(stream).text());
  }

  // --- the colours -------------------------------------------------------------------------------------------

  const theme = find("theme");
  const dark = () => document.documentElement.dataset.theme
    ? document.documentElement.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  const name = () => { theme.textContent = dark() ? "Light colours" : "Dark colours"; };
  theme.addEventListener("click", () => { document.documentElement.dataset.theme = dark() ? "light" : "dark"; name(); });
  theme.hidden = false;
  name();

  // --- what is there -----------------------------------------------------------------------------------------

  const blocks = document.querySelectorAll("script[data-block]");
  const unpacked = new Map();
  let index, columns, words, shown = [], page = 0, current = -1;
  const state = { label: "all", store: "0", branch: "0", kind: "", tool: "", search: "" };

  async function transcript(row) {
    let block = 0;
    while (block + 1 < index.starts.length && index.starts[block + 1] <= row) block += 1;
    if (!unpacked.has(block)) {
      if (unpacked.size > 8) unpacked.clear();
      unpacked.set(block, unpack(blocks[block].textContent));
    }
    return (await unpacked.get(block))[row - index.starts[block]];
  }

  const has = (row, label) => label === "all" || (columns.labels[row] >> index.labels.indexOf(label)) & 1;

  function matches(row) {
    return (state.store === "" || columns.store[row] === Number(state.store))
      && (state.branch === "" || columns.branch[row] === Number(state.branch))
      && (state.kind === "" || columns.kind[row] === Number(state.kind))
      && (state.tool === "" || (state.tool === "-1" ? columns.tools[row].length === 0
        : columns.tools[row].includes(Number(state.tool))))
      && (state.search === "" || words[row].includes(state.search));
  }

  function filter() {
    const counts = Object.fromEntries(Object.keys(LABELS).map((label) => [label, 0]));
    shown = [];
    for (let row = 0; row < words.length; row += 1) {
      if (!matches(row)) continue;
      for (const label in counts) if (has(row, label)) counts[label] += 1;
      if (has(row, state.label)) shown.push(row);
    }
    for (const label in counts) {
      const count = find(`count-${label}`);
      count.textContent = numbers.format(counts[label]);
      count.parentElement.classList.toggle("empty", counts[label] === 0);
    }
    page = 0;
    list();
  }

  // --- the list ----------------------------------------------------------------------------------------------

  const stores = () => index.stores.length > 1;

  function summary(row) {
    const verdict = VERDICTS[columns.verdict[row]];
    const tools = columns.tools[row].map((tool) => index.tools[tool]);
    const rest = [tools.length ? `called ${tools.join(", ")}` : "answered directly"];
    if (columns.branch[row]) rest.push(BRANCHES[index.branches[columns.branch[row]]].toLowerCase());
    if (stores() && state.store === "") rest.push(index.stores[columns.store[row]]);
    return [make("span", { class: verdict === "failed" ? "wrong" : verdict }, verdict), ` · ${rest.join(" · ")}`];
  }

  function list() {
    const rows = shown.slice(page * PAGE, (page + 1) * PAGE);
    find("runs").replaceChildren(...rows.map((row) => make("li", {}, make(
      "button", { type: "button", "data-row": row, "aria-current": row === current ? "true" : undefined },
      make("span", { class: "line1", dir: "auto" }, columns.text[row] || "(no text)"),
      make("span", { class: "line2" }, ...summary(row)),
    ))));
    const pages = Math.max(1, Math.ceil(shown.length / PAGE));
    find("count").textContent = `${numbers.format(shown.length)} of ${numbers.format(words.length)} runs`;
    find("page").textContent = `Page ${page + 1} of ${numbers.format(pages)}`;
    find("earlier").disabled = page === 0;
    find("later").disabled = page + 1 >= pages;
  }

  // --- one run -----------------------------------------------------------------------------------------------

  const code = (text) => make("pre", { dir: "auto" }, text);
  const round = (value) => String(Number(Number(value).toPrecision(4)));

  function values(pairs) {
    return pairs.flatMap(([key, value]) => value.includes("\n") || value.length > 90 || !key
      ? [key ? make("div", { class: "argument" }, key) : null, code(value)]
      : [make("div", { class: "argument" }, `${key}: `, make("code", { dir: "auto" }, value))]).filter(Boolean);
  }

  function decision(it, step) {
    const said = [it.allowed?.length ? `May call ${it.allowed.join(", ")}${it.required ? ", and must" : ""}` : "Answer directly"];
    if (it.gate) said.push(`by ${it.gate}`);
    const chances = (it.probabilities || []).map(([tool, value]) => `${tool} ${value === null ? "?" : round(value)}`);
    if (chances.length) said.push(`worth calling: ${chances.join(", ")}`);
    if (it.threshold !== undefined) said.push(`threshold ${round(it.threshold)}`);
    if (it.propensity !== undefined) said.push(`explored with probability ${round(it.propensity)}`);
    const rest = [it.reason ? make("div", { class: "notes" }, it.reason) : null];
    if (it.shadow) rest.push(make("div", { class: "argument" }, "A watching gate would have decided:"), ...values(it.shadow));
    return make("li", { class: "decision" }, make("p", { class: "who" }, make("b", {}, `Step ${step + 1}`), ` · ${said.join(" · ")}`), ...rest);
  }

  function part(it) {
    if (it.image !== undefined) {
      const uri = document.querySelector(`script[data-picture="${Number(it.image)}"]`).textContent.trim();
      return make("img", { src: uri, alt: "An image of this run", loading: "lazy" });
    }
    return it.note ? make("p", { class: "notes" }, it.note) : make("div", { class: "said", dir: "auto" }, it.text);
  }

  const ROLES = { human: "User", ai: "Model", tool: "Tool", system: "System" };

  function step(it) {
    const who = [make("b", {}, ROLES[it.role] || it.role || "Message")];
    if (it.tool) who.push(` · ${it.tool}`);
    if (it.status) who.push(` · ${it.status} · ${round(it.seconds ?? 0)} s${it.cost ? ` · cost ${round(it.cost)}` : ""}`);
    const calls = (it.calls || []).flatMap((call) => [
      make("p", { class: "who" }, "calls ", make("b", {}, call.tool)), ...values(call.arguments || []),
      call.error ? make("p", { class: "wrong" }, call.error) : null,
    ]);
    const parts = (it.parts || []).map((inner) => it.role === "tool" && inner.text !== undefined ? code(inner.text) : part(inner));
    return make("li", { class: ["human", "ai", "tool"].includes(it.role) ? it.role : "" },
      make("p", { class: "who" }, ...who), ...values(it.arguments || []), ...parts, ...calls);
  }

  function badges(row) {
    const verdict = VERDICTS[columns.verdict[row]];
    const found = [make("li", { class: `badge ${verdict === "failed" ? "wrong" : verdict}` }, verdict)];
    found.push(make("li", { class: "badge" }, BRANCHES[index.branches[columns.branch[row]]]));
    for (const label of index.labels) {
      if (!["wrong", "failed"].includes(label) && has(row, label)) found.push(make("li", { class: "badge" }, LABELS[label]));
    }
    if (stores()) found.push(make("li", { class: "badge" }, index.stores[columns.store[row]]));
    return make("ul", { class: "badges" }, ...found);
  }

  function others(row) {
    const same = [];
    for (let other = 0; other < words.length && same.length < 24; other += 1) {
      if (other !== row && columns.question[other] === columns.question[row]) same.push(other);
    }
    if (!same.length) return [];
    return [make("h4", {}, "Other runs of this question"), make("div", { class: "others" }, ...same.map((other) => make(
      "button", { type: "button", "data-row": other },
      `${stores() ? `${index.stores[columns.store[other]]} · ` : ""}${BRANCHES[index.branches[columns.branch[other]]]} · `,
      `${VERDICTS[columns.verdict[other]]}: ${(columns.answer[other] || "no answer").slice(0, 60)}`,
    )))];
  }

  async function open(row, focus = true) {
    current = row;
    const run = await transcript(row);
    if (current !== row) return;
    const facts = [
      ["Answer", run.answer || "(none)"], ["Reference", run.reference], ["Error", run.error],
      ["Kind", index.kinds[columns.kind[row]]], ["Tool calls", String(columns.calls[row])],
      ["Seconds", round(run.seconds || 0)], ["Cost", run.cost ? round(run.cost) : ""],
      ["Began", dated(run.started)],
      ["Run", run.id], ...(run.metadata || []),
    ].filter(([, value]) => value !== undefined && value !== "");
    const back = make("button", { type: "button", id: "back" }, "Back to the list");
    back.addEventListener("click", close);
    find("run").replaceChildren(
      back, make("h3", { class: "asked", dir: "auto" }, run.question || "(no text)"), badges(row),
      make("dl", { class: "facts" }, ...facts.flatMap(([key, value]) => [make("dt", {}, key), make("dd", { dir: "auto" }, value)])),
      ...(run.decisions ? [make("h4", {}, "Decisions"), make("ol", { class: "steps" }, ...run.decisions.map(decision))] : []),
      ...(run.steps ? [make("h4", {}, "Trajectory"), make("ol", { class: "steps" }, ...run.steps.map(step))] : []),
      ...(run.more ? [make("p", { class: "notes" }, `${numbers.format(run.more)} more messages are left out of this report.`)] : []),
      ...others(row),
    );
    find("split").classList.add("open");
    for (const button of find("runs").querySelectorAll("button")) {
      if (Number(button.dataset.row) === row) button.setAttribute("aria-current", "true");
      else button.removeAttribute("aria-current");
    }
    history.replaceState(null, "", `#run-${row}`);
    if (focus) { find("run").focus({ preventScroll: true }); find("split").scrollIntoView({ block: "nearest" }); if (innerWidth <= 760 || find("run").getBoundingClientRect().top < 0) find("run").scrollIntoView(); }
  }

  function close() {
    find("split").classList.remove("open");
    (find("runs").querySelector(`[data-row="${current}"]`) || find("search")).focus();
  }

  // --- what the reader does ----------------------------------------------------------------------------------

  function choices(id, entries) {
    find(id).replaceChildren(...entries.map(([value, said]) => make("option", { value, selected: state[id] === value }, said)));
    find(id).addEventListener("change", () => { state[id] = find(id).value; filter(); });
  }

  function prepare() {
    for (const [label, said] of Object.entries(LABELS)) {
      const input = make("input", { type: "radio", name: "label", value: label, checked: label === "all" });
      input.addEventListener("change", () => { state.label = label; filter(); });
      find("labels").append(make("label", { class: "chip" }, input, said, make("small", { id: `count-${label}` })));
    }
    const present = [0, 1, 2].filter((branch) => columns.branch.includes(branch));
    if (!present.includes(0)) state.branch = "";
    choices("store", [...index.stores.map((said, number) => [String(number), said]), ["", "all"]]);
    find("store-field").hidden = !stores();
    choices("branch", [...present.map((branch) => [String(branch), BRANCHES[index.branches[branch]]]), ["", "all"]]);
    choices("kind", [["", "all"], ...index.kinds.map((kind, number) => [String(number), kind || "(none)"])]);
    choices("tool", [["", "any or none"], ["-1", "none"], ...index.tools.map((tool, number) => [String(number), tool])]);
    let waiting = 0;
    find("search").addEventListener("input", () => {
      clearTimeout(waiting);
      waiting = setTimeout(() => { state.search = find("search").value.trim().toLowerCase(); filter(); }, 120);
    });
    find("filters").addEventListener("submit", (event) => event.preventDefault());
    find("earlier").addEventListener("click", () => { page -= 1; list(); });
    find("later").addEventListener("click", () => { page += 1; list(); });
    find("split").addEventListener("click", (event) => {
      const button = event.target.closest("button[data-row]");
      if (button) open(Number(button.dataset.row));
    });
    find("run").addEventListener("keydown", (event) => { if (event.key === "Escape") close(); });
    find("runs").addEventListener("keydown", (event) => {
      const move = { ArrowDown: 1, ArrowUp: -1 }[event.key];
      const buttons = [...find("runs").querySelectorAll("button")];
      const next = move && buttons[buttons.indexOf(document.activeElement) + move];
      if (next) { event.preventDefault(); next.focus(); }
    });
  }

  async function start() {
    performance.mark("unpack");
    try {
      index = await unpack(find("index").textContent);
    } catch (error) {
      find("loading").textContent = `The decisions can't be read by this browser: ${error.message}. One of 2023 or later can.`;
      return;
    }
    columns = index.columns;
    words = columns.text.map((text, row) => `${text}\n${columns.answer[row]}\n${columns.reference[row]}`.toLowerCase());
    find("loading").hidden = true;
    if (!words.length) { find("loading").hidden = false; find("loading").textContent = "This report was made without any."; return; }
    prepare();
    filter();
    find("browser").hidden = false;
    const wanted = /^#run-(\d+)$/.exec(location.hash);
    if (wanted && Number(wanted[1]) < words.length) open(Number(wanted[1]));
    document.documentElement.dataset.ready = "true";
  }

  // The page is painted first: two frames, then the work.
  requestAnimationFrame(() => setTimeout(start, 0));
})();
