/* The lens: draws what a query reads and answers pointer and keyboard. It knows no attention and computes none.

   The same module runs in a notebook, where Python answers, and in a saved page, where `Page` does, from rows that
   Python packed. Both are a `model` with get, set, save_changes, on and off, and these traits:

   row, col    the query, a pixel of the first panel's image (a fraction of a pixel is allowed)
   layer, head a layer's name, and a number or "mean", for every panel
   fade        0 shows the attention, 1 the rollout
   scene       fixed, for every panel: name; shape [H, W] of the image that its model saw, whose pixels all positions
               are, centres at integers; picture (data URL) and its aspect; layers, each with name, title, heads,
               cells [rows, cols] and stride [rows, cols], and routes where the layer chooses whole regions: the
               fields of `RegionRoutes` of tracing.py, and tokens where cells become fewer tokens: for every head the
               token of every cell, or null, and pooled where queries read tokens beside cells: the token of every
               cell; first, last: cells and stride of the network's outer layers
   shown       the answer, for every panel: the row, col, layer, head it is for; cell [i, j] of the query; keys, float32
               x, y, weight of each key; counts, of the keys of each head; pooled, float32, the weight of each token that
               is read beside cells; last, the cell of the query in the last layer; heat, float32, the rollout over
               the cells of the first layer (last and heat only while fade > 0)

   This side sets row, col, layer, head, fade; the other side answers by setting shown. What is on the screen always
   belongs together: everything but the star at the query is drawn from `shown`. */

const VIRIDIS = [
  [68, 1, 84], [71, 45, 123], [59, 82, 139], [44, 114, 142], [33, 145, 140], [39, 173, 129], [92, 200, 99],
  [170, 220, 50], [253, 231, 37],
];
const STAR = "#E8112D";
const INK = "#222222";
/* Of the tokens that a query reads most: LIKED of panel.py, in the colours of the figures. */
const LIKED = { orange: "#F28E00", blue: "#38A8F0", green: "#00B07C", yellow: "#F0E442", purple: "#CC79A7" };
const MEAN = "mean";
const SMALL = 0.5; // of a cell's side: a square that leaves what is below it to be seen
const [NARROWEST, GAP] = [205, 16]; // px: a panel, and what lies between two
const PATIENCE = 1500; // ms without an answer after which the status says so

function colour(share, alpha = 1) {
  const at = Math.min(Math.max(share, 0), 1) * (VIRIDIS.length - 1);
  const low = Math.min(Math.floor(at), VIRIDIS.length - 2);
  const mix = VIRIDIS[low].map((c, i) => Math.round(c + (VIRIDIS[low + 1][i] - c) * (at - low)));
  return `rgba(${mix.join(",")},${alpha})`;
}

function element(tag, className, parent, properties = {}) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  Object.assign(made, properties);
  parent?.append(made);
  return made;
}

/* Numbers that came from Python are bytes in a DataView; those of a page are floats already. */
function floats(value) {
  if (value instanceof Float32Array) return value;
  return new Float32Array(value.buffer.slice(value.byteOffset, value.byteOffset + value.byteLength));
}

const short = (value, digits = 1) => String(+value.toFixed(digits));
const amount = (value) => (value === 0 ? "0" : String(+value.toPrecision(3)));
const place = (y, x) => `(row ${short(y)}, col ${short(x)})`;
const headName = (head, heads) => (head === MEAN ? `mean of ${heads} heads` : `head ${head}`);
const layerOf = (panel, name) => panel.layers.find((layer) => layer.name === name);

/* The query as a pixel of another panel's image: where `place` of panel.py puts it. */
function moved(row, col, from, to) {
  return [((row + 0.5) * to[0]) / from[0] - 0.5, ((col + 0.5) * to[1]) / from[1] - 0.5];
}

/* The cell that holds pixel (row, col): `Record.query`. */
function cellOf(row, col, grid) {
  return [row, col].map((value, i) => Math.min(Math.floor((value + 0.5) / grid.stride[i]), grid.cells[i] - 1));
}

function heaviest(values, step = 1, offset = 0) {
  let best = -1;
  for (let i = 0; i * step + offset < values.length; i++) {
    if (best < 0 || values[i * step + offset] > values[best * step + offset]) best = i;
  }
  return best;
}

function onCells(keys, grid) {
  for (let k = 0; k < keys.length; k += 3) {
    for (const i of [0, 1]) {
      const cell = (keys[k + 1 - i] + 0.5) / grid.stride[i] - 0.5;
      if (Math.abs(cell - Math.round(cell)) > 1e-3) return false;
    }
  }
  return true;
}

/* How many keys are shown, and where the number comes from: `count_name` of panel.py. */
function countName(found, counts, cells) {
  const [one, heads, what] = [counts[0], counts.length, cells ? "cells" : "points"];
  const alike = counts.every((count) => count === one);
  if (alike && found === one) return `${found} ${what}`;
  if (alike && !cells && found % one === 0) return `${one} ${what} × ${found / one} groups`;
  if (alike) return `${found} ${what} (${one} × ${heads} heads${found < one * heads ? ", some shared" : ""})`;
  return `${found} ${what} of ${heads} heads`;
}

/* The regions that the region of a query reads, `RegionRoutes` of tracing.py: edges [top, left, bottom, right]. */
function edges(number, side, grid) {
  const [i, j] = [Math.floor(number / grid[1]), number % grid[1]];
  return [i * side[0] - 0.5, j * side[1] - 0.5, (i + 1) * side[0] - 0.5, (j + 1) * side[1] - 0.5];
}

function regionsOf({ query_side, query_grid, key_side, key_grid, routes }, row, col) {
  const [i, j] = cellOf(row, col, { stride: query_side, cells: query_grid });
  const region = i * query_grid[1] + j;
  return { own: edges(region, query_side, query_grid), read: routes[region].map((s) => edges(s, key_side, key_grid)) };
}

/* To how many regions the region of a query is routed: and what outlines mean; panel.py says the same. */
const regionCount = ({ key_grid }) => key_grid[0] * key_grid[1];
const showsRoutes = (routes) => Boolean(routes) && routes.routes[0].length < regionCount(routes);
const meaningOfRoutes = ({ readers }) =>
  `Outlines: the regions that the ${readers} of the dashed region read; 1 is liked most.` +
  (readers === "queries" ? "" : ` The query reads all ${readers}.`);
const routesName = (routes) => {
  if (!routes) return "";
  const who = routes.readers === "queries" ? "its region is" : `the ${routes.readers} of its region are`;
  return `; ${who} routed to ${routes.routes[0].length} of ${regionCount(routes)} regions`;
};

/* The token of every cell, in a head or in all heads alike; null where cells are read as they are. */
function mergedOf({ tokens }, head) {
  if (!tokens) return null;
  if (head !== MEAN) return tokens[head];
  const alike = tokens.every((one) => one && one.every((token, cell) => token === tokens[0][cell]));
  return alike ? tokens[0] : null;
}

/* The tokens that keys lie on, each with the sum of their weights, the most liked first: `tokens_read` of panel.py. */
function tokensRead(keys, merged, grid) {
  const [weights, sizes] = [new Map(), new Map()];
  for (const token of merged) sizes.set(token, (sizes.get(token) ?? 0) + 1);
  for (let k = 0; k < keys.length; k += 3) {
    const [i, j] = cellOf(keys[k + 1], keys[k], grid);
    const token = merged[i * grid.cells[1] + j];
    weights.set(token, (weights.get(token) ?? 0) + keys[k + 2]);
  }
  return liked([...weights].map(([number, weight]) => ({ number, weight, size: sizes.get(number) })));
}

const liked = (tokens) => tokens.sort((a, b) => b.weight - a.weight || a.number - b.number);

/* The tokens that a query reads beside its cells: `pooled_read` of panel.py. */
function pooledRead(weights, merged) {
  const sizes = Array(weights.length).fill(0);
  for (const token of merged) sizes[token] += 1;
  return liked([...weights].map((weight, number) => ({ number, weight, size: sizes[number] })));
}

const cellCount = (size) => `${size} cell${size > 1 ? "s" : ""}`;
const tokensName = (read) => {
  const most = Object.keys(LIKED).slice(0, read.length);
  const each = most.map((name, n) => `${name} ${amount(read[n].weight)} (${cellCount(read[n].size)})`);
  return `${read.length} tokens, ${amount(1 / read.length)} each if all were alike; read most: ${each.join(", ")}`;
};

/* What the marks on a panel mean: `meaning` of panel.py. */
const MEANING = {
  cells: "Squares: cells that the query reads; colour: weight.",
  points: "Dots: points that the query reads; area and colour: weight.",
  tokens:
    "Many cells became one token. Colours: cells of the tokens that the query reads most. White: cells of the " +
    "others that it reads; the brighter, the more their token gets.",
  beside:
    "Small squares: cells of its window that the query reads; colour: weight. Below them: every window is also one " +
    "token. Colours: cells of the windows that the query reads most. White: the others; the brighter, the more " +
    "their window gets.",
};

function meaning(fade, marks) {
  const rollout =
    "Rollout: how much each cell of the first layer gives to the query's cell of the last, over all layers.";
  return [...(fade < 1 ? [MEANING[marks]] : []), ...(fade > 0 ? [rollout] : [])].join(" ");
}

/* How many columns of equal width hold n panels: one row if they fit, else rows that are as full as each other. */
function columnsFor(n, width) {
  const fit = Math.max(1, Math.min(n, Math.floor((width + GAP) / (NARROWEST + GAP))));
  return Math.ceil(n / Math.ceil(n / fit));
}

/* ------------------------------------------------------------------------------------------------------ one panel */

class Panel {
  constructor(model, number, parent) {
    this.model = model;
    this.number = number;
    this.panel = model.get("scene")[number];
    const { name, aspect, picture, layers, shape } = this.panel;

    this.figure = element("figure", "lens-panel", parent);
    const caption = element("figcaption", "", this.figure);
    element("span", "lens-name", caption, { textContent: name });
    this.heads = this.choice("head", caption);
    this.layers = this.choice("layer", this.figure);
    for (const layer of layers) {
      element("option", "", this.layers, { value: layer.name, textContent: layer.title, title: layer.name });
    }

    this.stage = element("div", "lens-stage", this.figure, { tabIndex: 0 });
    this.stage.style.setProperty("--lens-aspect", aspect);
    this.stage.setAttribute("role", "application");
    this.stage.setAttribute("aria-roledescription", "attention lens");
    this.stage.setAttribute("aria-label", `Photograph of ${shape[0]} by ${shape[1]} pixels, seen by ${name}`);
    element("img", "", this.stage, { src: picture, alt: "", draggable: false });
    this.canvas = element("canvas", "", this.stage);
    this.tip = element("div", "lens-tip", this.stage, { hidden: true });

    this.scale = element("div", "lens-scale", this.figure);
    this.scaleName = element("span", "", this.scale);
    element("span", "", this.scale, { textContent: "0" });
    element("span", "lens-bar", this.scale).style.background = `linear-gradient(to right, ${VIRIDIS.map((c) => `rgb(${c})`)})`;
    this.most = element("span", "", this.scale);
    this.meaning = element("p", "lens-meaning", this.figure);
    this.status = element("p", "lens-status", this.figure);
    this.status.id = `lens-${Math.random().toString(36).slice(2)}`;
    this.status.setAttribute("role", "status");
    this.stage.setAttribute("aria-describedby", this.status.id);

    this.layers.addEventListener("change", () => this.choose(this.layers.value));
    this.heads.addEventListener("change", () => {
      this.send({ head: this.heads.value === MEAN ? MEAN : Number(this.heads.value) });
    });
    this.stage.addEventListener("pointerdown", (event) => this.press(event));
    this.stage.addEventListener("pointermove", (event) => this.hover(event));
    this.stage.addEventListener("pointerleave", () => this.point(null));
    this.observer = new ResizeObserver(() => this.draw());
    this.observer.observe(this.stage);
  }

  choice(name, parent) {
    const label = element("label", "lens-choice", parent, { textContent: name === "layer" ? "" : name }); // a layer says it
    const select = element("select", `lens-${name}`, label);
    select.setAttribute("aria-label", name);
    return select;
  }

  /* What was chosen, and what is shown; the two differ while an answer is under way. */
  get chosen() {
    const [layer, head] = ["layer", "head"].map((name) => this.model.get(name)[this.number]);
    return { row: this.model.get("row"), col: this.model.get("col"), layer, head };
  }

  get shown() {
    const answer = this.model.get("shown")[this.number];
    if (answer !== this.answer) {
      this.answer = answer;
      this.decoded = answer && { ...answer };
      if (answer) {
        for (const name of ["keys", "pooled", "heat"]) this.decoded[name] = floats(answer[name]);
        const layer = layerOf(this.panel, answer.layer);
        const { keys, pooled } = this.decoded;
        const beside = Boolean(layer.pooled);
        const merged = layer.pooled ?? mergedOf(layer, answer.head);
        const tokens = beside ? pooledRead(pooled, merged) : merged && tokensRead(keys, merged, layer);
        const marks = beside && keys.length ? "beside" : tokens ? "tokens" : onCells(keys, layer) ? "cells" : "points";
        Object.assign(this.decoded, { beside, merged, tokens, marks });
      }
    }
    return this.decoded;
  }

  get waiting() {
    if (this.shown && this.model.get("fade") > 0 && !this.shown.heat.length) return true;
    return !this.shown || Object.entries(this.chosen).some(([name, value]) => this.shown[name] !== value);
  }

  /* ---- what the user does ---- */

  send(changes) {
    for (const [name, value] of Object.entries(changes)) {
      const all = this.model.get(name);
      this.model.set(name, Array.isArray(all) ? all.map((old, p) => (p === this.number ? value : old)) : value);
    }
    this.model.save_changes();
  }

  choose(name) {
    const { head } = this.chosen;
    const last = layerOf(this.panel, name).heads - 1;
    this.send({ layer: name, head: head === MEAN ? MEAN : Math.min(head, last) });
  }

  /* Where the pointer is, as a pixel (row, col) of this panel's image, with its fraction. */
  under(event) {
    const box = this.canvas.getBoundingClientRect();
    const [H, W] = this.panel.shape;
    return [((event.clientY - box.top) / box.height) * H - 0.5, ((event.clientX - box.left) / box.width) * W - 0.5];
  }

  query(row, col) {
    const first = this.model.get("scene")[0].shape;
    const within = [row, col].map((value, i) => Math.min(Math.max(value, 0), this.panel.shape[i] - 1));
    const [r, c] = moved(...within, this.panel.shape, first);
    this.send({ row: r, col: c });
  }

  press(event) {
    if (event.button !== 0) return;
    this.stage.focus({ preventScroll: true });
    this.query(...this.under(event).map(Math.round));
  }

  key(event) {
    const { row, col, layer, head } = this.chosen;
    const grid = layerOf(this.panel, layer);
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    const turn = { ",": ["head", -1], ".": ["head", 1], "[": ["layer", -1], "]": ["layer", 1] };
    const [what, by] = turn[event.key] ?? { PageUp: ["layer", -1], PageDown: ["layer", 1] }[event.key] ?? [];
    if (!(step || what)) return;
    event.preventDefault();
    if (step) {
      const here = moved(row, col, this.model.get("scene")[0].shape, this.panel.shape);
      this.query(...here.map((value, i) => value + step[i] * grid.stride[i]));
    } else if (what === "layer") {
      const names = this.panel.layers.map((one) => one.name);
      const next = names[names.indexOf(layer) + by];
      if (next) this.choose(next);
    } else {
      const heads = [MEAN, ...Array(grid.heads).keys()];
      const next = heads[heads.indexOf(head) + by];
      if (next !== undefined) this.send({ head: next });
    }
  }

  hover(event) {
    const shown = this.shown;
    if (!shown) return;
    const fade = this.model.get("fade");
    const [row, col] = this.under(event);
    const grid = layerOf(this.panel, shown.layer);
    const found = { x: col, y: row, lines: [] };
    if (fade < 1 && shown.tokens) {
      const [i, j] = cellOf(row, col, grid);
      const number = shown.merged[i * grid.cells[1] + j];
      const token = i >= 0 && j >= 0 && shown.tokens.find((one) => one.number === number);
      if (token) {
        found.token = number;
        found.lines.push(`weight ${amount(token.weight)}, a token of ${cellCount(token.size)}`);
      }
    }
    if (fade < 1 && (shown.beside || !shown.tokens)) {
      const key = this.nearest(row, col, grid);
      if (key !== null) {
        const [x, y, weight] = shown.keys.subarray(3 * key, 3 * key + 3);
        Object.assign(found, { x, y, key });
        found.lines.unshift(`weight ${amount(weight)} at ${place(y, x)}`);
      }
    }
    if (fade > 0 && shown.heat.length) {
      const [i, j] = cellOf(row, col, this.panel.first);
      if (i >= 0 && j >= 0) found.lines.push(`rollout ${amount(shown.heat[i * this.panel.first.cells[1] + j])}`);
    }
    this.point(found.lines.length ? found : null);
  }

  /* The key at a pixel: the cell around it, or the nearest point within reach of a finger. */
  nearest(row, col, grid) {
    const { keys } = this.shown;
    const unit = this.unit();
    const cells = this.shown.marks !== "points";
    let best = null;
    let least = cells ? 1 : 14;
    for (let k = 0; k < keys.length / 3; k++) {
      const dx = Math.abs(keys[3 * k] - col);
      const dy = Math.abs(keys[3 * k + 1] - row);
      const far = cells ? 2 * Math.max(dx / grid.stride[1], dy / grid.stride[0]) : Math.hypot(dx * unit[0], dy * unit[1]);
      if (far <= least) [best, least] = [k, far];
    }
    return best;
  }

  /* Show a key's weight beside it, or nothing. */
  point(found) {
    this.pointed = found?.key ?? null;
    this.pointedToken = found?.token ?? null;
    this.tip.hidden = !found;
    if (found) {
      const unit = this.unit();
      this.tip.replaceChildren(...found.lines.map((text) => element("div", "", null, { textContent: text })));
      const [x, y] = [(found.x + 0.5) * unit[0], (found.y + 0.5) * unit[1]];
      const { offsetWidth: width, offsetHeight: height } = this.tip;
      const left = Math.min(Math.max(x - width / 2, 2), this.canvas.clientWidth - width - 2);
      const top = y - height - 14 < 2 ? y + 14 : y - height - 14;
      this.tip.style.transform = `translate(${Math.round(left)}px, ${Math.round(top)}px)`;
    }
    this.draw();
  }

  /* ---- what is drawn ---- */

  /* Screen pixels for one pixel of the image: across, down. */
  unit() {
    const [H, W] = this.panel.shape;
    return [this.canvas.clientWidth / W, this.canvas.clientHeight / H];
  }

  update() {
    const { layer, head } = this.chosen;
    const { heads } = layerOf(this.panel, layer);
    this.layers.value = layer;
    this.layers.title = layer;
    if (this.heads.length !== heads + 1) {
      this.heads.replaceChildren();
      element("option", "", this.heads, { value: MEAN, textContent: "mean" });
      for (let m = 0; m < heads; m++) element("option", "", this.heads, { value: m, textContent: m });
    }
    this.heads.value = head;
    this.tip.hidden = true;
    this.pointed = this.pointedToken = null;
    this.describe();
    this.draw();
  }

  describe() {
    clearTimeout(this.timer);
    if (this.waiting) {
      this.timer = setTimeout(() => {
        this.status.textContent = "Waiting for Python to answer. Without a kernel, run the cell again or open the page that lens.save() writes.";
      }, PATIENCE);
    }
    const shown = this.shown;
    if (!shown) return;
    const fade = this.model.get("fade");
    const { keys, heat } = shown;
    const layer = layerOf(this.panel, shown.layer);
    const key = heaviest(keys, 3, 2);
    const [x, y, weight] = keys.subarray(3 * key, 3 * key + 3);
    const query = moved(shown.row, shown.col, this.model.get("scene")[0].shape, this.panel.shape);
    let text = `Query ${place(...query)}, cell ${place(...shown.cell)} of ${layer.title}, ${headName(shown.head, layer.heads)}: `;
    const parts = [];
    if (key >= 0 && (!shown.tokens || shown.beside)) {
      const number = countName(keys.length / 3, shown.counts, shown.marks !== "points");
      parts.push(`${number}, heaviest ${amount(weight)} at ${place(y, x)}`);
    }
    if (shown.tokens) parts.push(tokensName(shown.tokens));
    text += parts.join("; then ") || "no keys";
    text += routesName(layer.routes);
    const hot = heaviest(heat);
    if (fade > 0 && hot >= 0) {
      const { cells, stride } = this.panel.first;
      const at = [Math.floor(hot / cells[1]), hot % cells[1]].map((cell, i) => (cell + 0.5) * stride[i] - 0.5);
      text += `. Rollout of cell ${place(...shown.last)} of the last layer: heaviest ${amount(heat[hot])} at ${place(...at)}`;
    }
    this.status.textContent = text;
    this.meaning.textContent = `${layer.cells.join(" × ")} queries. ${meaning(fade, shown.marks)}`;
    if (fade < 1 && showsRoutes(layer.routes)) this.meaning.textContent += ` ${meaningOfRoutes(layer.routes)}`;
    const rollout = fade > 0.5 && hot >= 0;
    this.scale.style.visibility = shown.tokens && !shown.beside && !rollout ? "hidden" : "visible"; // tokens have colours of their own
    this.scaleName.textContent = rollout ? "rollout" : "weight";
    this.most.textContent = amount(rollout ? heat[hot] : key < 0 ? 0 : weight);
    const regions = layer.routes ? regionsOf(layer.routes, ...query) : null;
    this.figure.lens = { ...shown, fade, regions }; // for scripts: what is on the screen, as numbers
  }

  draw() {
    const { clientWidth: width, clientHeight: height } = this.canvas;
    const ratio = globalThis.devicePixelRatio || 1;
    if (!width || !height) return;
    this.canvas.width = Math.round(width * ratio);
    this.canvas.height = Math.round(height * ratio);
    const ink = this.canvas.getContext("2d");
    ink.scale(ratio, ratio);
    const shown = this.shown;
    if (!shown) return;
    const fade = this.model.get("fade");
    const { first, last } = this.panel;
    const layer = layerOf(this.panel, shown.layer);
    if (fade < 1) {
      ink.globalAlpha = 1 - fade;
      if (shown.tokens) this.drawTokens(ink, shown, layer);
      if (shown.beside) this.drawCells(ink, shown.keys, layer, { size: SMALL });
      else if (shown.marks === "cells") this.drawCells(ink, shown.keys, layer);
      else if (!shown.tokens) this.drawDots(ink, shown.keys);
    }
    if (fade > 0) {
      ink.globalAlpha = fade;
      const heat = new Float32Array(3 * shown.heat.length);
      shown.heat.forEach((value, s) => {
        const cell = [Math.floor(s / first.cells[1]), s % first.cells[1]];
        const [y, x] = cell.map((n, i) => (n + 0.5) * first.stride[i] - 0.5);
        heat.set([x, y, value], 3 * s);
      });
      this.drawCells(ink, heat, first, { least: 0.3 });
    }
    ink.globalAlpha = 1 - fade;
    if (fade < 1 && showsRoutes(layer.routes)) {
      const query = moved(shown.row, shown.col, this.model.get("scene")[0].shape, this.panel.shape);
      this.drawRegions(ink, regionsOf(layer.routes, ...query));
    }
    this.drawFrame(ink, shown.cell, layer);
    ink.globalAlpha = fade;
    if (fade > 0 && shown.last) this.drawFrame(ink, shown.last, last);
    ink.globalAlpha = 1;
    this.drawStar(ink);
  }

  /* A cell's box on the screen, on whole pixels and inside the picture; `share` of its sides around its centre. */
  box(y, x, grid, share = 1) {
    const unit = this.unit();
    const ends = [-share / 2, share / 2];
    const [left, right] = ends.map((side) => Math.round((x + side * grid.stride[1] + 0.5) * unit[0]));
    const [top, bottom] = ends.map((side) => Math.round((y + side * grid.stride[0] + 0.5) * unit[1]));
    return [left, top, Math.min(right, this.canvas.clientWidth) - left, Math.min(bottom, this.canvas.clientHeight) - top];
  }

  /* Squares that cover the picture the more, the more weight they have; smaller ones have rims. */
  drawCells(ink, keys, grid, { least = 0.45, size = 1 } = {}) {
    const most = keys[3 * heaviest(keys, 3, 2) + 2] || 1;
    for (let k = 0; k < keys.length; k += 3) {
      const share = keys[k + 2] / most;
      const box = this.box(keys[k + 1], keys[k], grid, size);
      ink.fillStyle = colour(share, size < 1 ? 1 : least + (0.9 - least) * share);
      ink.fillRect(...box);
      if (size === 1) continue;
      ink.strokeStyle = INK;
      ink.lineWidth = 0.6;
      ink.strokeRect(...box);
    }
    if (this.pointed !== null && grid !== this.panel.first) {
      ink.strokeStyle = "white";
      ink.lineWidth = 1.5;
      ink.strokeRect(...this.box(keys[3 * this.pointed + 1], keys[3 * this.pointed], grid));
    }
  }

  /* Every token over its cells: those that are read most in colours of their own, the others white by weight. */
  drawTokens(ink, { tokens, merged }, grid) {
    const [alpha, rank] = [ink.globalAlpha, new Map(tokens.map((token, n) => [token.number, n]))];
    const cells = [...merged.keys()].filter((cell) => rank.has(merged[cell]));
    const box = (cell) => {
      const at = [Math.floor(cell / grid.cells[1]), cell % grid.cells[1]];
      return this.box(...at.map((n, i) => (n + 0.5) * grid.stride[i] - 0.5), grid);
    };
    for (const cell of cells) {
      const n = rank.get(merged[cell]);
      const liked = Object.values(LIKED)[n];
      ink.globalAlpha = alpha * (liked ? 0.85 : (0.5 * tokens[n].weight) / tokens[0].weight);
      ink.fillStyle = liked ?? "white";
      ink.fillRect(...box(cell));
      ink.globalAlpha = alpha;
      ink.strokeStyle = INK;
      ink.lineWidth = 0.6;
      if (liked) ink.strokeRect(...box(cell));
    }
    for (const cell of cells) if (merged[cell] === this.pointedToken) this.outline(ink, box(cell), 1.2);
  }

  drawDots(ink, keys) {
    const [across, down] = this.unit();
    const most = keys[3 * heaviest(keys, 3, 2) + 2] || 1;
    const largest = Math.max(7, 0.032 * this.canvas.clientWidth);
    const order = [...Array(keys.length / 3).keys()].sort((a, b) => keys[3 * b + 2] - keys[3 * a + 2]);
    for (const k of order) {
      const [x, y, weight] = keys.subarray(3 * k, 3 * k + 3);
      const share = weight / most;
      const radius = Math.max(2.2, largest * Math.sqrt(share));
      const disc = (size, fill) => {
        ink.beginPath();
        ink.arc((x + 0.5) * across, (y + 0.5) * down, size, 0, 2 * Math.PI);
        ink.fillStyle = fill;
        ink.fill();
      };
      disc(radius + (k === this.pointed ? 3.5 : 1.8), k === this.pointed ? "white" : "rgba(255,255,255,.7)");
      disc(radius + 0.7, INK);
      disc(radius, colour(share));
    }
  }

  drawFrame(ink, [i, j], grid) {
    this.outline(ink, this.box((i + 0.5) * grid.stride[0] - 0.5, (j + 0.5) * grid.stride[1] - 0.5, grid), 2.2);
  }

  /* The regions that are read, numbered as they are liked, and the query's own, dashed. */
  drawRegions(ink, { own, read }) {
    const box = ([top, left, bottom, right]) =>
      this.box((top + bottom) / 2, (left + right) / 2, { stride: [bottom - top, right - left] });
    ink.font = "10px sans-serif";
    ink.textBaseline = "top";
    ink.lineJoin = "round";
    read.forEach((one, rank) => {
      const [left, top, ...size] = box(one);
      this.outline(ink, [left, top, ...size], 1.3);
      ink.lineWidth = 2.5;
      ink.strokeStyle = INK;
      ink.strokeText(rank + 1, left + 3, top + 3);
      ink.fillStyle = "white";
      ink.fillText(rank + 1, left + 3, top + 3);
    });
    ink.setLineDash([5, 3]);
    ink.lineWidth = 2.4;
    ink.strokeStyle = STAR;
    ink.strokeRect(...box(own));
    ink.setLineDash([]);
  }

  /* A light line with dark rims. */
  outline(ink, box, width) {
    for (const [wide, stroke] of [[2 * width, INK], [width, "white"]]) {
      ink.lineWidth = wide;
      ink.strokeStyle = stroke;
      ink.strokeRect(...box);
    }
  }

  drawStar(ink) {
    const unit = this.unit();
    const [row, col] = moved(this.model.get("row"), this.model.get("col"), this.model.get("scene")[0].shape, this.panel.shape);
    ink.beginPath();
    for (let n = 0; n < 10; n++) {
      const [radius, angle] = [n % 2 ? 3.6 : 9, (n * Math.PI) / 5 - Math.PI / 2];
      ink.lineTo((col + 0.5) * unit[0] + radius * Math.cos(angle), (row + 0.5) * unit[1] + radius * Math.sin(angle));
    }
    ink.closePath();
    ink.lineJoin = "round";
    ink.lineWidth = 3;
    ink.strokeStyle = "white";
    ink.stroke();
    ink.fillStyle = STAR;
    ink.fill();
  }

  remove() {
    this.observer.disconnect();
    clearTimeout(this.timer);
  }
}

/* ------------------------------------------------------------------------------------------------------- the view */

function render({ model, el }) {
  const root = element("div", "dynattn-lens", el);
  const bar = element("label", "lens-fade", root);
  element("span", "", bar, { textContent: "attention" });
  const fade = element("input", "", bar, { type: "range", min: 0, max: 1, step: 0.01 });
  fade.setAttribute("aria-label", "from attention to rollout");
  element("span", "", bar, { textContent: "rollout" });
  fade.addEventListener("input", () => {
    model.set("fade", Number(fade.value));
    model.save_changes();
  });
  const row = element("div", "lens-panels", root);
  const panels = model.get("scene").map((_, number) => new Panel(model, number, row));

  /* Panels are as wide as each other, and photographs no higher than the window has room for. */
  const arrange = () => {
    const columns = columnsFor(panels.length, row.clientWidth);
    row.style.setProperty("--lens-columns", columns);
    const rows = columns > 1 ? Math.ceil(panels.length / columns) : 1; // one column is for scrolling
    row.style.setProperty("--lens-rows", rows);
    row.classList.toggle("lens-low", rows > 1);
  };
  const observer = new ResizeObserver(arrange);
  observer.observe(row);

  const help = element("p", "lens-help", root);
  element("span", "", help, { textContent: "★ the query, framed: its cell; (row, col): pixels of what the model saw" });
  const keys = [["click", "a pixel"], ["← ↑ ↓ →", "next cell"], [", .", "head"], ["[ ] or PgUp PgDn", "layer"]];
  for (const [key, text] of keys) {
    const item = element("span", "", help);
    element("kbd", "", item, { textContent: key });
    item.append(` ${text}`);
  }

  /* Notebooks have shortcuts on plain keys, arrows among them, and listen before anything in the page does; keys typed
     into the lens are for the lens. */
  const type = (event) => {
    const path = event.composedPath();
    const plain = !(event.ctrlKey || event.metaKey || event.altKey);
    if (!path.includes(root) || !plain || ["Enter", "Escape", "Tab"].includes(event.key)) return;
    event.stopPropagation();
    panels.find((panel) => panel.stage === path[0])?.key(event);
  };
  window.addEventListener("keydown", type, true);

  const update = () => {
    fade.value = model.get("fade");
    panels.forEach((panel) => panel.update());
  };
  const events = ["row", "col", "layer", "head", "fade", "shown"].map((name) => `change:${name}`);
  for (const event of events) model.on(event, update);
  update();
  return () => {
    observer.disconnect();
    window.removeEventListener("keydown", type, true);
    for (const event of events) model.off(event, update);
    panels.forEach((panel) => panel.remove());
  };
}

export default { render };

/* ------------------------------------------------------------------------------------- a page that answers itself */

const TYPES = { float32: Float32Array, uint8: Uint8Array, uint16: Uint16Array, uint32: Uint32Array };

/* The arrays that `pack` of page.py packed. */
async function unpack(text) {
  const zipped = new Blob([Uint8Array.from(atob(text), (c) => c.charCodeAt(0))]);
  const bytes = await new Response(zipped.stream().pipeThrough(new DecompressionStream("gzip"))).arrayBuffer();
  const length = new DataView(bytes).getUint32(0, true);
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(bytes, 4, length)));
  const arrays = {};
  for (const [name, [type, start, size]] of Object.entries(header)) {
    arrays[name] = new TYPES[type](bytes, 4 + length + start, size);
  }
  return arrays;
}

/* What a layer's queries read, see `pack_rows` of page.py: of a query and head, keys as x, y, weight, and counts. */
async function layerRows(text, layer) {
  const { position, count, scale, step, weight, most: mostPooled, pooled } = await unpack(text);
  const start = new Uint32Array(count.length + 1);
  count.forEach((n, row) => (start[row + 1] = start[row] + n));
  const queries = layer.cells[0] * layer.cells[1];
  const most = 2 ** (8 * weight.BYTES_PER_ELEMENT) - 1;

  return (query, head) => {
    const heads = head === MEAN ? [...Array(layer.heads).keys()] : [head];
    const sum = new Map();
    for (const m of heads) {
      const row = m * queries + query;
      let at = 0;
      for (let k = start[row]; k < start[row + 1]; k++) {
        at += step[k];
        sum.set(at, (sum.get(at) ?? 0) + (scale[row] * weight[k]) / most / heads.length);
      }
    }
    const size = pooled ? pooled.length / count.length : 0;
    const beside = new Float32Array(size);
    for (const m of heads) {
      const row = m * queries + query;
      for (let n = 0; n < size; n++) beside[n] += (mostPooled[row] * pooled[row * size + n]) / 65535 / heads.length;
    }
    return {
      pooled: beside,
      keys: Float32Array.from([...sum].flatMap(([at, w]) => [position[2 * at], position[2 * at + 1], w])),
      counts: heads.map((m) => count[m * queries + query]),
    };
  };
}

async function rolloutRows(text, cells) {
  const { scale, weight } = await unpack(text);
  const size = cells[0] * cells[1];
  return (query) => Float32Array.from(weight.subarray(query * size, (query + 1) * size), (w) => (scale[query] * w) / 255);
}

/* A saved page's stand-in for Python. */
class Page {
  constructor({ state, rows, rollouts }) {
    Object.assign(this, { state, rows, rollouts, listeners: {}, unpacked: new Map() });
  }

  get(name) {
    return this.state[name];
  }

  set(name, value) {
    this.state[name] = value;
    for (const listener of this.listeners[`change:${name}`] ?? []) listener();
  }

  on(event, listener) {
    (this.listeners[event] ??= []).push(listener);
  }

  off(event, listener) {
    this.listeners[event] = this.listeners[event].filter((other) => other !== listener);
  }

  async save_changes() {
    const answer = await Promise.all(this.state.scene.map((panel, p) => this.answer(panel, p, this.state.row, this.state.col)));
    const late = answer.some(({ row, col, layer, head }, p) => {
      const now = this.state;
      return row !== now.row || col !== now.col || layer !== now.layer[p] || head !== now.head[p];
    });
    if (!late) this.set("shown", answer);
  }

  async answer(panel, p, row, col) {
    const [layer, head] = [layerOf(panel, this.state.layer[p]), this.state.head[p]];
    const at = moved(row, col, this.state.scene[0].shape, panel.shape);
    const [cell, last] = [cellOf(...at, layer), cellOf(...at, panel.last)];
    const read = await this.once(`${p} ${layer.name}`, () => layerRows(this.rows[p][layer.name], layer));
    const heat = await this.once(p, () => rolloutRows(this.rollouts[p], panel.first.cells));
    return {
      row, col, layer: layer.name, head, cell, last,
      ...read(cell[0] * layer.cells[1] + cell[1], head),
      heat: heat(last[0] * panel.last.cells[1] + last[1]),
    };
  }

  once(name, make) {
    if (!this.unpacked.has(name)) this.unpacked.set(name, make());
    return this.unpacked.get(name);
  }
}

export async function openPage(el, payload) {
  const page = new Page(payload);
  try {
    await page.save_changes();
    render({ model: page, el });
  } catch (error) {
    el.textContent = `This browser cannot show the lens: ${error.message}`;
    throw error;
  }
}
