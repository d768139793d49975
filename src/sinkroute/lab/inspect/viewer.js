"use strict";
// The token viewer of `sinkroute inspect`. Text of the document is only ever set as textContent.
const TOLD = JSON.parse(document.getElementById("told").textContent);
const CHECKPOINTS = TOLD.checkpoints, MOST = TOLD.most;
const $ = (name) => document.getElementById(name);
const state = { layer: 0, view: "both", rank: 0, filter: CHECKPOINTS.map(() => null), pin: null };
let panels = [], latest = 0;

function make(tag, name, text) {
  const made = document.createElement(tag);
  if (name) made.className = name;
  if (text !== undefined) made.textContent = text;
  return made;
}

// -- unpacking: see viewer_pack.py -----------------------------------------------------------------------------------

const LETTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz!#$%&()*+-;,=>?@^_`{|}~";
const DIGITS = new Uint8Array(128);
for (let i = 0; i < 85; i++) DIGITS[LETTERS.charCodeAt(i)] = i;

function bytesOf(letters) {
  const fives = Math.ceil(letters.length / 5), view = new DataView(new ArrayBuffer(4 * fives));
  for (let five = 0; five < fives; five++) {
    let number = 0;
    for (let i = 5 * five; i < 5 * five + 5; i++) number = 85 * number + (i < letters.length ? DIGITS[letters.charCodeAt(i)] : 84);
    view.setUint32(4 * five, number);
  }
  return new Uint8Array(view.buffer, 0, 4 * fives - (5 * fives - letters.length));
}

async function inflate(letters) {
  const packed = bytesOf(letters);
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

function unpack(bytes, how) {
  const T = how.tokens, K = how.top_k, size = T * K;
  let at = 0;
  const take = (count) => bytes.subarray(at, (at += count));
  const numbers = (count) => {
    const out = Uint16Array.from(take(count));
    if (how.wide) take(count).forEach((upper, i) => (out[i] += 256 * upper));
    return out;
  };
  const experts = numbers(size), levels = Uint8Array.from(take(size));
  for (let i = T; i < size; i++) levels[i] = levels[i - T] - levels[i];
  const out = { T, K, experts, levels };
  if (how.factor === null) return out;
  out.factors = take(how.factor === "token" ? T : size);
  const masks = take(Math.ceil(K / 8) * T);
  const dropped = new Uint8Array(size);
  let count = 0;
  for (let k = 0; k < K; k++)
    for (let t = 0; t < T; t++) count += dropped[k * T + t] = (masks[(k >> 3) * T + t] >> (k & 7)) & 1;
  const news = numbers(count), newLevels = take(count);
  out.dropped = dropped;
  out.moved = new Uint8Array(T);
  out.balanced = new Uint16Array(size);
  out.balancedLevels = new Uint8Array(size);
  out.isNew = new Uint8Array(size);
  for (let t = 0, next = 0; t < T; t++) {
    const row = [];
    let level = 0, first = true;
    for (let k = 0; k < K; k++) {
      const i = k * T + t;
      if (!dropped[i]) row.push([experts[i], levels[i], 0]);
      else {
        level = first ? newLevels[next] : (level - newLevels[next]) & 255;
        first = false;
        row.push([news[next++], level, 1]);
        out.moved[t] = 1;
      }
    }
    row.sort((a, b) => b[1] - a[1]);
    row.forEach(([expert, level, fresh], k) => {
      out.balanced[k * T + t] = expert;
      out.balancedLevels[k * T + t] = level;
      out.isNew[k * T + t] = fresh;
    });
  }
  return out;
}

async function decoded(layer) {
  if (!layer.blob) return null;
  layer.data ??= unpack(await inflate($(layer.blob).textContent), layer);
  return layer.data;
}

const valueOf = (level, peak) => (level ? peak * 2 ** ((level - 255) / 16) : 0);
function shown(value) {
  if (value === 0) return "≈ 0";
  return value >= 0.1 ? value.toFixed(2) : value.toPrecision(2).replace(/e-?\d+$/, (power) => power);
}

// -- panels ----------------------------------------------------------------------------------------------------------

function build() {
  const views = state.view === "both" ? ["own", "balanced"] : [state.view];
  $("panels").replaceChildren();
  panels = [];
  CHECKPOINTS.forEach((checkpoint, which) => {
    for (const view of views) {
      const root = make("section", "panel"), title = make("h2"), facts = make("p", "muted");
      const legend = make("div", "legend"), text = make("div", "text"), tokens = [];
      const name = CHECKPOINTS.length > 1 ? checkpoint.name + ": " : "";
      title.textContent = name + (view === "own" ? "the model's own routes" : "balanced top-k");
      legend.setAttribute("role", "group");
      legend.setAttribute("aria-label", "experts: show only the tokens of one");
      if (checkpoint.side) text.classList.add("gallery");
      text.tabIndex = 0;
      text.setAttribute("role", "group");
      text.setAttribute("aria-label", title.textContent + ": the text");
      let block = null;
      checkpoint.words.forEach((word, place) => {
        const first = place % checkpoint.window === 0;
        if (first && !checkpoint.side) text.append((block = make("div", "window")));
        if (first && checkpoint.side) text.append(picture(checkpoint, place / checkpoint.window));
        if (checkpoint.side) block = first ? text.lastChild : text.lastChild.lastChild;
        const token = make("span", "t", checkpoint.side && !first ? undefined : word);
        token.place = place;
        token.kind = "t" + (word === "" ? " none" : /[\n\r]/.test(word) ? " line" : "");
        tokens.push(token);
        first && checkpoint.side ? block.prepend(token) : block.append(token);
      });
      root.append(title, facts, legend, text);
      $("panels").append(root);
      const panel = { which, view, checkpoint, root, facts, legend, text, tokens };
      text.panel = panel;
      listen(panel);
      panels.push(panel);
    }
  });
}

function picture(checkpoint, number) {
  const made = make("div", "picture"), patches = make("div", "patches");
  patches.style.gridTemplateColumns = `repeat(${checkpoint.side}, 1fr)`;
  patches.style.backgroundImage = `url("${checkpoint.pictures[number]}")`;
  made.append(patches);
  return made;
}

const layerOf = (checkpoint) => checkpoint.layers[Math.min(state.layer, checkpoint.layers.length - 1)];

async function draw() {
  const turn = ++latest;
  const layers = CHECKPOINTS.map(layerOf);
  let data;
  try {
    data = await Promise.all(layers.map(decoded));
  } catch (error) {
    $("trouble").hidden = false;
    $("trouble").textContent =
      "This browser cannot unpack the tokens (" + error + "). Chrome or Edge 111, Firefox 113, Safari 16.4 or later can.";
    return;
  }
  if (turn !== latest) return; // another layer has been asked for meanwhile
  $("where").textContent = [...new Set(layers.map((layer) => layer.label))].join(" | ") +
    ` (${state.layer + 1} of ${Math.max(...CHECKPOINTS.map((one) => one.layers.length))})`;
  $("layer").setAttribute("aria-valuetext", "layer " + $("where").textContent);
  for (const panel of panels) paint(panel, layers[panel.which], data[panel.which]);
  $("all").hidden = state.filter.every((expert) => expert === null);
  if (state.pin) hold(state.pin.panel, state.pin.place);
}

function paint(panel, layer, data) {
  const { tokens, view } = panel, filter = state.filter[panel.which];
  panel.layer = layer;
  const experts = data && (view === "own" ? data.experts : data.balanced);
  panel.data = experts ? data : null;
  if (!experts) {
    panel.facts.className = "reason";
    panel.facts.textContent = "not understood: " + (layer.reason ?? "its choices were not kept");
    panel.legend.replaceChildren();
    for (const token of tokens) token.className = token.kind + " off";
    return;
  }
  const { T, K, moved } = data, rank = Math.min(state.rank, K - 1);
  const loads = new Uint32Array(layer.experts);
  for (let i = 0; i < T * K; i++) loads[experts[i]]++;
  let having = 0;
  const write = layer.experts > MOST;
  for (let t = 0; t < T; t++) {
    let expert = experts[rank * T + t];
    if (filter !== null) {
      expert = -1;
      for (let k = 0; k < K; k++) if (experts[k * T + t] === filter) expert = filter;
      having += expert === filter;
    }
    const name = tokens[t].kind + (expert < 0 ? " off" : " e" + (expert % MOST)) + (moved?.[t] ? " moved" : "");
    if (tokens[t].className !== name) tokens[t].className = name;
    if (write) expert < 0 ? tokens[t].removeAttribute("data-e") : tokens[t].setAttribute("data-e", expert);
  }
  drawLegend(panel, layer, loads, (T * K) / layer.experts, filter);
  panel.facts.className = "muted";
  panel.facts.textContent = factsOf(panel, layer, data, loads, filter, having);
}

function maxVio(loads) {
  let sum = 0, most = 0;
  for (const load of loads) (sum += load), (most = Math.max(most, load));
  return sum ? most / (sum / loads.length) - 1 : 0;
}

function factsOf(panel, layer, data, loads, filter, having) {
  const whole = panel.view === "own" ? layer.load : layer.balanced_load;
  const out = [`top ${data.K} of ${layer.experts}`, `MaxVio ${maxVio(loads).toFixed(2)} over these tokens`];
  if (panel.checkpoint.tokens !== data.T) out.push(`${maxVio(whole).toFixed(2)} over all that were counted`);
  const dead = loads.filter((load) => load === 0).length;
  if (dead) out.push(`${dead} expert${dead > 1 ? "s" : ""} without a token here`);
  if (data.moved) {
    const moves = data.moved.reduce((sum, one) => sum + one, 0);
    out.push(`${moves.toLocaleString("en")} of ${data.T.toLocaleString("en")} tokens move (${((100 * moves) / data.T).toFixed(1)} %)`);
  } else if (layer.reason) out.push("no balanced choice: " + layer.reason);
  if (filter !== null) out.push(`expert ${filter} has ${having.toLocaleString("en")} tokens`);
  return out.join("; ");
}

function drawLegend(panel, layer, loads, fair, filter) {
  const top = Math.max(...loads, 1), { legend } = panel;
  if (legend.children.length !== loads.length) {
    legend.replaceChildren(...Array.from(loads, (_, expert) => {
      const chip = make("button", "e" + (expert % MOST)), bar = make("i");
      chip.type = "button";
      chip.expert = expert;
      chip.share = make("span");
      chip.append(make("b", "", expert), " ", chip.share, bar);
      return chip;
    }));
  }
  const whole = panel.view === "own" ? layer.load : layer.balanced_load;
  for (const chip of legend.children) {
    const load = loads[chip.expert], share = (load / fair).toFixed(1) + "×";
    chip.share.textContent = share;
    chip.firstChild.className = load ? "" : "dead";
    chip.lastChild.style.width = Math.max(2, (100 * load) / top) + "%";
    chip.setAttribute("aria-pressed", chip.expert === filter);
    chip.title = `expert ${chip.expert}: ${load.toLocaleString("en")} choices of the tokens shown, ${share} a fair share` +
      (whole ? `; ${whole[chip.expert].toLocaleString("en")} over all that were counted` : "");
    chip.setAttribute("aria-label", chip.title);
  }
}

// -- one token -------------------------------------------------------------------------------------------------------

function describe(panel, place) {
  const { layer, data, checkpoint } = panel, tip = $("tip");
  const head = make("div");
  head.append(make("code", "", checkpoint.words[place] === "" ? "·" : JSON.stringify(checkpoint.words[place]).slice(1, -1)),
    ` token ${place.toLocaleString("en")}, layer ${layer.label}`);
  tip.replaceChildren(head);
  if (!data) return;
  const { T, K } = data, table = make("table"), scored = data.factors !== undefined;
  const row = (cells, name, expert) => {
    const made = make("tr", name);
    for (const cell of cells) made.append(make(expert === undefined ? "th" : "td", "", cell));
    if (expert !== undefined) made.firstChild.replaceChildren(make("span", "e" + (expert % MOST), expert));
    table.append(made);
  };
  row(scored ? ["expert", "weight", "score", ""] : ["expert", "weight", ""]);
  for (let k = 0; k < K; k++) {
    const i = k * T + place, value = valueOf(data.levels[i], layer.peak);
    if (!scored) {
      row(["", shown(value), ""], "", data.experts[i]);
      continue;
    }
    const factor = valueOf(data.factors[layer.factor === "token" ? place : i], layer.factor_peak);
    const gone = data.dropped[i];
    row(["", shown(value * factor), shown(value), gone ? "balance drops it" : ""], gone ? "gone" : "", data.experts[i]);
  }
  for (let k = 0; scored && k < K; k++) {
    const i = k * T + place;
    if (data.isNew[i]) row(["", "", shown(valueOf(data.balancedLevels[i], layer.peak)), "balance adds it"], "", data.balanced[i]);
  }
  tip.append(table);
}

function show(panel, place) {
  const tip = $("tip");
  describe(panel, place);
  tip.hidden = false;
  const box = panel.tokens[place].getClientRects()[0] ?? panel.tokens[place].getBoundingClientRect();
  const wide = document.documentElement.clientWidth, high = document.documentElement.clientHeight;
  const left = Math.max(8, Math.min(box.left, wide - tip.offsetWidth - 8));
  const below = box.bottom + 6 + tip.offsetHeight <= high;
  tip.style.transform = `translate(${left}px, ${below ? box.bottom + 6 : Math.max(8, box.top - tip.offsetHeight - 6)}px)`;
}

function mark(on) {
  // The same place in all panels, as far as checkpoints cut the text alike.
  const { panel, place } = state.pin;
  const word = panel.checkpoint.words[place];
  for (const one of panels)
    if (one.checkpoint.words[place] === word) one.tokens[place].classList.toggle("pin", on);
}

function hold(panel, place, into) {
  if (state.pin) mark(false);
  state.pin = { panel, place };
  mark(true);
  if (into) panel.tokens[place].scrollIntoView({ block: "nearest" });
  show(panel, place);
}

function release() {
  if (state.pin) mark(false);
  state.pin = null;
  $("tip").hidden = true;
}

function listen(panel) {
  const { text, legend } = panel;
  const under = (event) => event.target.closest(".t");
  text.addEventListener("pointerover", (event) => {
    const token = under(event);
    if (!state.pin && token && event.pointerType !== "touch") show(panel, token.place);
  });
  text.addEventListener("pointerleave", () => state.pin || ($("tip").hidden = true));
  text.addEventListener("click", (event) => {
    const token = under(event);
    if (!token || (state.pin && state.pin.panel === panel && state.pin.place === token.place)) release();
    else hold(panel, token.place);
  });
  text.addEventListener("keydown", (event) => {
    if (event.key !== "Enter") return;
    const first = panel.tokens.findIndex((token) => token.getBoundingClientRect().top >= $("controls").offsetHeight);
    state.pin ? release() : hold(panel, Math.max(0, first));
  });
  legend.addEventListener("click", (event) => {
    const chip = event.target.closest("button");
    if (!chip) return;
    state.filter[panel.which] = state.filter[panel.which] === chip.expert ? null : chip.expert;
    release();
    draw();
  });
}

// -- controls --------------------------------------------------------------------------------------------------------

const most = Math.max(...CHECKPOINTS.map((one) => one.layers.length));
function toLayer(layer) {
  state.layer = Math.max(0, Math.min(most - 1, layer));
  $("layer").value = state.layer;
  draw();
}

function everyExpert() {
  state.filter.fill(null);
  draw();
}

$("layer").max = most - 1;
$("layer").addEventListener("input", () => toLayer(+$("layer").value));
$("view").addEventListener("change", () => {
  release();
  state.view = $("view").value;
  build();
  draw();
});
const choices = Math.max(1, ...CHECKPOINTS.flatMap((one) => one.layers.map((layer) => layer.top_k ?? 1)));
$("rank").append(...Array.from({ length: choices }, (_, k) => new Option(`${k + 1} of ${choices}`, k)));
$("rank").parentElement.hidden = choices === 1;
$("rank").addEventListener("change", () => {
  state.rank = +$("rank").value;
  draw();
});
$("numbers").addEventListener("change", () => document.body.classList.toggle("numbers", $("numbers").checked));
$("all").addEventListener("click", everyExpert);
addEventListener("scroll", () => (state.pin ? show(state.pin.panel, state.pin.place) : ($("tip").hidden = true)), { passive: true });
addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.altKey || event.metaKey) return;
  if (event.key === "Escape") return state.pin ? release() : everyExpert();
  if (event.target.matches("input[type=range], select")) return;
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (step && event.shiftKey && state.pin) {
    const { panel, place } = state.pin;
    hold(panel, Math.max(0, Math.min(panel.tokens.length - 1, place + step)), true);
  } else if (step) toLayer(state.layer + step);
  else return;
  event.preventDefault();
});

const known = (layer) => "balanced_load" in layer && layer.blob;
if (!CHECKPOINTS.some((one) => one.layers.some(known))) {
  $("view").value = state.view = "own";
  $("view").parentElement.hidden = true;
}
build();
draw().then(() => requestAnimationFrame(() => setTimeout(() => performance.mark("drawn"))));
