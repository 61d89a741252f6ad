// Tooltips, sortable tables, plate maps, confusion matrix, scatter plots, and CSV files of their data.
"use strict";
(() => {
const all = (selector, root = document) => [...root.querySelectorAll(selector)];
// `CLASS_COLORS` of perturbjax/core/colours.py.
const COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#332288", "#117733", "#AA4499", "#999933",
  "#661100", "#44AA99", "#6699CC", "#DDCC77", "#AA4466"], FREQUENT = 8;
const GRAY = "#9aa3ac";
const RAMP = ["#440154", "#414487", "#2a788e", "#22a884", "#7ad151", "#fde725"].map(rgb);
function rgb(hex) { return [1, 3, 5].map(at => parseInt(hex.slice(at, at + 2), 16)); }
function ramp(share) {
  const at = Math.min(Math.max(share, 0), 1) * (RAMP.length - 1), low = Math.min(Math.floor(at), RAMP.length - 2);
  return `rgb(${RAMP[low].map((v, i) => Math.round(v + (at - low) * (RAMP[low + 1][i] - v))).join()})`;
}
// Dark colors of classes are lighter in dark mode: `setColor` for elements, `shade` for canvases.
const luminance = ([r, g, b]) => .2126 * (r / 255) ** 2.2 + .7152 * (g / 255) ** 2.2 + .0722 * (b / 255) ** 2.2;
function lighter(hex) {
  // The same hue at full brightness: mixing with white would make different colors alike.
  const factor = luminance(rgb(hex)) < .12 ? 245 / Math.max(...rgb(hex)) : 1;
  return `rgb(${rgb(hex).map(v => Math.round(v * factor)).join()})`;
}
const isHex = color => color?.startsWith("#");
function setColor(node, property, color) {
  node.style[property] = color;
  if (isHex(color)) node.style[property] = `light-dark(${color}, ${lighter(color)})`;  // ignored by browsers of before 2024
}
const shade = (color, dark) => dark && isHex(color) ? lighter(color) : color;
const isDark = color => luminance(rgb(color("--ground"))) < .2;
const SVG = Object.assign(document.createElement("template"), {innerHTML: "<svg></svg>"}).content.firstChild.namespaceURI;
function make(tag, attributes = {}, ...children) {
  const svg = ["svg", "circle", "text", "rect"].includes(tag);
  const node = svg ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}
const short = value => typeof value === "number" ? String(+value.toPrecision(4)) : String(value ?? "");

// Embedded tables: {column: [values]}; repeated text as {levels, codes}.
const tables = new Map();
function read(id) {
  if (!tables.has(id)) {
    const content = JSON.parse(document.getElementById(id).textContent);
    for (const [name, column] of Object.entries(content))
      if (column.levels) content[name] = column.codes.map(code => column.levels[code]);
    tables.set(id, content);
  }
  return tables.get(id);
}
function csv(rows) {
  const cell = value => {
    let text = String(value ?? "");
    if (/^[=+\-@\t\r]/.test(text) && isNaN(Number(text))) text = "'" + text;  // a spreadsheet would run it as a formula
    return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  return rows.map(row => row.map(cell).join()).join("\n") + "\n";
}
function rowsOf(source) {
  if (source.tagName === "TABLE")
    return all("tr", source).map(row => all("th, td", row).map(cell => cell.dataset.value ?? cell.textContent.trim()));
  const table = read(source.id), names = Object.keys(table);
  return [names, ...table[names[0]].map((_, at) => names.map(name => table[name][at]))];
}
for (const button of all("button[data-csv]")) button.addEventListener("click", () => {
  const link = make("a", {download: `${button.dataset.name}.csv`});
  link.href = URL.createObjectURL(new Blob([csv(rowsOf(document.getElementById(button.dataset.csv)))], {type: "text/csv"}));
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
});

// Tooltips for mouse, touch and keyboard.
const tip = make("div", {class: "tip", role: "tooltip", id: "tip", hidden: ""});
document.body.append(tip);
function showTip(x, y, text, picture) {
  tip.replaceChildren(...(picture ? [picture] : []), text);
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(4, Math.min(x + 14, innerWidth - box.width - 6))}px`;
  tip.style.top = `${y + 16 + box.height > innerHeight ? Math.max(4, y - box.height - 10) : y + 16}px`;
}
const hideTip = () => { tip.hidden = true; };
const showTipAt = (node, text) => { const box = node.getBoundingClientRect(); showTip(box.left, box.bottom - 10, text); };
const tipped = event => event.target.closest?.("[data-tip]");
document.addEventListener("pointerover", event => {
  const node = tipped(event);
  if (node) showTip(event.clientX, event.clientY, node.dataset.tip);
});
document.addEventListener("pointerout", event => { if (tipped(event)) hideTip(); });
document.addEventListener("focusin", event => { const node = tipped(event); if (node) showTipAt(node, node.dataset.tip); });
document.addEventListener("focusout", hideTip);
document.addEventListener("keydown", event => { if (event.key === "Escape") hideTip(); });

// Sortable tables with a search field.
for (const table of all("table.sortable")) {
  const body = table.tBodies[0], heads = all("thead th", table);
  const value = (row, at) => row.cells[at].dataset.value ?? row.cells[at].textContent.trim();
  heads.forEach((head, at) => all("button", head).forEach(button => button.addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") ? head.getAttribute("aria-sort") === "ascending" : !head.classList.contains("text");
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const order = (a, b) => a === "" || b === "" ? (a === "") - (b === "") :  // empty cells last
      (down ? -1 : 1) * (isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b);
    body.append(...[...body.rows].sort((a, b) => order(value(a, at), value(b, at))));
  })));
}
for (const input of all("input[data-filter]")) {
  const count = input.parentElement.querySelector("output");
  input.addEventListener("input", () => {
    const query = input.value.trim().toLowerCase(), rows = all(input.dataset.filter);
    for (const row of rows) row.hidden = !(row.dataset.name ?? row.textContent).toLowerCase().includes(query);
    if (count) count.textContent = query ? `${rows.filter(row => !row.hidden).length} of ${rows.length}` : "";
  });
}

// Colors of a column: a color scale for numbers, one color for each of the most frequent texts.
function coloring(values, palette) {
  const present = values.filter(value => value !== null && value !== "");
  if (present.every(value => typeof value === "number")) {
    // From the 2nd to the 98th percentile, so that single outliers do not hide all other differences.
    const sorted = [...present].sort((a, b) => a - b), last = sorted.length - 1;
    let [low, high] = [sorted[Math.floor(.02 * last)], sorted[Math.ceil(.98 * last)]];
    if (low === high) [low, high] = [sorted[0], sorted[last]];
    const round = value => String(+value.toPrecision(Math.abs(value) < 100 ? 2 : 3));
    const ends = [(sorted[0] < low ? "≤ " : "") + round(low), (sorted[last] > high ? "≥ " : "") + round(high)];
    const legend = make("span", {}, ends[0], make("span", {class: "ramp"}), ends[1]);
    return {color: value => value === null || value === "" ? null : ramp((value - low) / (high - low || 1)), legend: present.length ? [legend] : []};
  }
  const counts = new Map();
  for (const value of present) counts.set(value, (counts.get(value) ?? 0) + 1);
  const swatch = (color, name) => { const mark = make("span", {class: "swatch"}); setColor(mark, "background", color); return make("span", {}, mark, name); };
  // Few names have the same colors on all pages: their order by name, empty wells last.
  const byName = [...counts.keys()].sort((a, b) => (a === "empty") - (b === "empty") || (a < b ? -1 : 1));
  const byCount = [...byName].sort((a, b) => counts.get(b) - counts.get(a)).slice(0, FREQUENT);
  const named = palette ? Object.keys(palette).filter(name => counts.has(name)) : counts.size <= COLORS.length ? byName : byCount;
  const hue = name => named.includes(name) ? palette?.[name] ?? COLORS[named.indexOf(name)] : GRAY;
  const legend = named.map(name => swatch(hue(name), name));
  if (counts.size > named.length) legend.push(swatch(GRAY, `${counts.size - named.length} other${counts.size > named.length + 1 ? "s" : ""}`));
  return {color: hue, legend};
}
function chooser(words, options, chosen) {
  const select = make("select");
  for (const option of options) select.append(make("option", {value: option}, option));
  select.addEventListener("change", () => chosen(select.value));
  return make("label", {}, words + " ", select);
}

// Plate maps.
function plates(box) {
  const table = read(box.dataset.table), hidden = new Set(["row", "column", "site"]);
  const columns = Object.keys(table).filter(name => !hidden.has(name));
  const first = box.dataset.color, choices = [first, ...columns.filter(name => !["plate", "well", "flagged", first].includes(name))];
  const height = +box.dataset.rows, width = +box.dataset.columns, side = 20;
  const letters = row => row < 26 ? String.fromCharCode(65 + row) : "A" + String.fromCharCode(39 + row);
  const legend = make("p", {class: "legend"}), field = make("div", {class: "plates"}), circles = [];
  const wide = (width + 1) * side + 4;  // keeps row and column names readable on every plate format
  field.style.setProperty("--plate", `${Math.min(Math.max(wide, 230), 640)}px`);
  const text = at => columns.filter(name => short(table[name][at])).map(name => `${name}: ${short(table[name][at])}`).join("\n");
  function draw(plate) {
    const svg = make("svg", {viewBox: `0 0 ${wide} ${(height + 1) * side}`, tabindex: "0", role: "img", style: `max-width: ${Math.max(1.4 * wide, 280)}px`,
      "aria-label": `plate ${plate.name}, ${plate.rows.length} wells; use arrow keys to read them`});
    for (let column = 0; column < width; column += width > 12 ? 2 : 1)
      svg.append(make("text", {x: (column + 1.5) * side, y: 13, "text-anchor": "middle"}, String(column + 1)));
    for (let row = 0; row < height; row++)
      svg.append(make("text", {x: 15, y: (row + 1.5) * side + 4, "text-anchor": "end"}, letters(row)));
    for (let row = 0; row < height; row++) for (let column = 0; column < width; column++)
      svg.append(make("circle", {class: "none", cx: (column + 1.5) * side, cy: (row + 1.5) * side, r: 1.6}));
    const own = plate.rows.map(at => {
      const tested = table.part?.[at] === "test", flagged = table.flagged?.[at];
      const circle = make("circle", {cx: (table.column[at] + 1.5) * side, cy: (table.row[at] + 1.5) * side,
        r: table.part && !tested ? 5 : 8.3, class: tested ? "tested" : flagged ? "flagged" : ""});
      circle.at = at;
      svg.append(circle);
      return circle;
    });
    circles.push(...own);
    svg.addEventListener("pointermove", event => event.target.at === undefined ? hideTip() : showTip(event.clientX, event.clientY, text(event.target.at)));
    svg.addEventListener("pointerleave", hideTip);
    let here = -1;
    const point = to => {
      own[here]?.classList.remove("at");
      here = (to + own.length) % own.length;
      own[here].classList.add("at");
      showTipAt(own[here], text(own[here].at));
    };
    svg.addEventListener("keydown", event => {
      const step = {ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1}[event.key];
      if (step) { event.preventDefault(); point(here < 0 ? 0 : here + step); }
      if (event.key === "Enter" && here >= 0) go(own[here].at);
    });
    svg.addEventListener("blur", () => own[here]?.classList.remove("at"));
    svg.addEventListener("click", event => { if (event.target.at !== undefined) go(event.target.at); });
    field.append(make("figure", {}, make("figcaption", {}, plate.name), svg));
  }
  const go = at => { if (table.site && document.getElementById(table.site[at])) location.hash = table.site[at]; };
  function paint(name) {
    const {color, legend: entries} = coloring(table[name]);
    for (const circle of circles) setColor(circle, "fill", color(table[name][circle.at]) ?? "var(--well)");
    legend.replaceChildren(...entries);
  }
  const byPlate = new Map();
  table.plate.forEach((name, at) => byPlate.set(name, [...(byPlate.get(name) ?? []), at]));
  const tested = ({rows}) => table.part && rows.some(at => table.part[at] === "test") ? 0 : 1;
  const list = [...byPlate].map(([name, rows]) => ({name, rows})).sort((a, b) => tested(a) - tested(b)), select = chooser("color", choices, paint);
  const rest = list.splice(24);
  list.forEach(draw);
  const more = make("button", {type: "button", class: "more"}, `${rest.length} more plates`);
  more.addEventListener("click", () => { rest.forEach(draw); more.remove(); paint(select.querySelector("select").value); });
  box.append(make("div", {class: "tools"}, select, legend), field, ...(rest.length ? [more] : []));
  paint(first);
}

// A canvas as wide as its box; redrawn when its size or the colors change.
function canvasIn(box, label, draw) {
  const canvas = make("canvas", {tabindex: "0", role: "img", "aria-label": label});
  const again = () => {
    const width = Math.min(box.clientWidth, 900), height = Math.min(width, 760), scale = devicePixelRatio || 1;
    canvas.width = width * scale; canvas.height = height * scale;
    canvas.style.width = `${width}px`; canvas.style.height = `${height}px`;
    const pen = canvas.getContext("2d"), style = getComputedStyle(document.documentElement);
    pen.scale(scale, scale);
    draw(pen, width, height, name => style.getPropertyValue(name).trim());
  };
  new ResizeObserver(again).observe(box);
  for (const media of ["(prefers-color-scheme: dark)", "print"]) matchMedia(media).addEventListener("change", again);
  document.addEventListener("theme", again);
  return [canvas, again];
}

function confusion(box) {
  const table = read(box.dataset.table), names = read(box.dataset.classes)["class"], orders = read(box.dataset.classes);
  const number = new Map(names.map((name, at) => [name, at])), total = names.map(() => 0), cells = new Map();
  table.true.forEach((name, at) => {
    const row = number.get(name), column = number.get(table.predicted[at]);
    cells.set(row * names.length + column, table.sites[at]);
    total[row] += table.sites[at];
  });
  const ways = Object.keys(orders).filter(name => name !== "class");
  let order = orders[ways[0]], from = [0, 0], span = names.length, here = null, frame = null;
  const message = make("output", {class: "message"});
  const text = ([row, column]) => {
    const a = order[row], b = order[column], sites = cells.get(a * names.length + b) ?? 0;
    const share = total[a] ? ` (${(100 * sites / total[a]).toFixed(1)} %)` : "";
    return a === b ? `${names[a]}: ${sites} of ${total[a]} sites predicted correctly${share}` :
      `${names[a]} predicted as ${names[b]}: ${sites} of ${total[a]} sites${share}`;
  };
  const [canvas, again] = canvasIn(box, box.dataset.label, (pen, width, height, color) => {
    const dark = isDark(color);
    pen.font = "11px system-ui, sans-serif";
    const named = (Math.min(width, height) - 20) / span >= 11;
    const longest = Math.max(...Array.from({length: span}, (_, at) => from.map(start => pen.measureText(names[order[start + at]]).width)).flat());
    const left = named ? Math.min(190, width * .3, longest + 26) : 22, top = left, cell = Math.min(width - left, height - top) / span;
    frame = {left, top, cell};
    pen.fillStyle = color("--raised");
    pen.fillRect(left, top, cell * span, cell * span);
    for (let row = 0; row < span; row++) for (let column = 0; column < span; column++) {
      const a = order[from[0] + row], sites = cells.get(a * names.length + order[from[1] + column]);
      if (!sites) continue;
      const share = Math.sqrt(sites / total[a]), own = a === order[from[1] + column];
      const [low, high] = dark ? [[43, 52, 61], own ? [86, 180, 233] : [255, 154, 60]] : [[238, 241, 244], own ? [0, 84, 140] : [213, 94, 0]];
      const fill = low.map((v, i) => Math.round(v + (high[i] - v) * (.12 + .88 * share)));
      pen.fillStyle = `rgb(${fill.join()})`;
      pen.fillRect(left + column * cell, top + row * cell, Math.max(cell - (cell > 6 ? 1 : 0), .7), Math.max(cell - (cell > 6 ? 1 : 0), .7));
      if (cell > 26) {
        pen.fillStyle = luminance(fill) > .18 ? "#000" : "#fff";  // equal contrast with both at .18
        pen.font = "11px system-ui, sans-serif"; pen.textAlign = "center"; pen.textBaseline = "middle";
        pen.fillText(String(Math.round(100 * share * share)), left + (column + .5) * cell, top + (row + .5) * cell);
      }
    }
    pen.fillStyle = color("--soft"); pen.font = "11px system-ui, sans-serif"; pen.textBaseline = "middle";
    const clip = name => { let text = name; while (text.length > 3 && pen.measureText(text).width > left - 22) text = text.slice(0, -2) + "…"; return text; };
    if (named) for (let at = 0; at < span; at++) {
      pen.textAlign = "right";
      pen.fillText(clip(names[order[from[0] + at]]), left - 5, top + (at + .5) * cell);
      pen.save();
      pen.translate(left + (at + .5) * cell, top - 5); pen.rotate(-Math.PI / 2); pen.textAlign = "left";
      pen.fillText(clip(names[order[from[1] + at]]), 0, 0);
      pen.restore();
    }
    pen.textAlign = "left"; pen.fillText("predicted →", left, 6);
    pen.save(); pen.translate(6, top); pen.rotate(-Math.PI / 2); pen.textAlign = "right"; pen.fillText("← true", 0, 0); pen.restore();
    if (here) {
      pen.strokeStyle = color("--ink"); pen.lineWidth = 2;
      pen.strokeRect(left + (here[1] - from[1]) * cell, top + (here[0] - from[0]) * cell, Math.max(cell, 3), Math.max(cell, 3));
    }
  });
  let drag = null;
  const inside = at => Math.min(Math.max(at, 0), names.length - span);
  const zoom = (factor, at = here ?? from.map(v => v + Math.floor(span / 2))) => {
    const old = span;
    span = Math.min(names.length, Math.max(Math.min(6, names.length), Math.round(span * factor)));
    from = from.map((v, i) => inside(Math.round(at[i] - (at[i] - v) * span / old)));
    again();
  };
  const where = event => {
    const area = canvas.getBoundingClientRect();
    const spot = [(event.clientY - area.top - frame.top) / frame.cell, (event.clientX - area.left - frame.left) / frame.cell].map(Math.floor);
    return spot.every(v => v >= 0 && v < span) ? spot.map((v, i) => v + from[i]) : null;
  };
  canvas.addEventListener("pointermove", event => {
    const spot = where(event);
    if (drag && event.buttons && frame) {
      const moved = [(drag.y - event.clientY) / frame.cell, (drag.x - event.clientX) / frame.cell].map(Math.round);
      from = drag.from.map((v, i) => inside(v + moved[i]));
    }
    here = spot;
    if (spot) { message.textContent = text(spot); showTip(event.clientX, event.clientY, text(spot)); } else hideTip();
    again();
  });
  canvas.addEventListener("pointerdown", event => { drag = {x: event.clientX, y: event.clientY, from: [...from]}; });
  canvas.addEventListener("pointerup", () => { drag = null; });
  canvas.addEventListener("pointerleave", () => { hideTip(); drag = null; });
  canvas.addEventListener("dblclick", event => { event.preventDefault(); zoom(.5, where(event) ?? undefined); });
  canvas.addEventListener("keydown", event => {
    const step = {ArrowDown: [1, 0], ArrowUp: [-1, 0], ArrowRight: [0, 1], ArrowLeft: [0, -1]}[event.key];
    if (step) {
      event.preventDefault();
      here = (here ?? [from[0], from[1]]).map((v, i) => Math.min(Math.max(v + step[i], 0), names.length - 1));
      from = from.map((v, i) => Math.min(Math.max(v, here[i] - span + 1), here[i]));
      message.textContent = text(here);
      again();
    }
    if (event.key === "+" || event.key === "=") zoom(.5);
    if (event.key === "-") zoom(2);
  });
  const button = (words, label, act) => { const b = make("button", {type: "button", "aria-label": label}, words); b.addEventListener("click", act); return b; };
  const tools = make("div", {class: "tools"}, chooser("order", ways, way => { order = orders[way]; here = null; again(); }));
  if (names.length > 12) tools.append(button("+", "zoom in", () => zoom(.5)), button("−", "zoom out", () => zoom(2)),
    button("all", "show all classes", () => { span = names.length; from = [0, 0]; again(); }));
  box.append(tools, canvas, message);
}

function scatter(box) {
  const table = read(box.dataset.table), choices = JSON.parse(box.dataset.colors);
  const shown = Object.keys(table).filter(name => !["x", "y", "picture", "control"].includes(name));
  const palette = box.dataset.palette && JSON.parse(box.dataset.palette), isTest = at => !table.part || table.part[at] === "test";
  const text = at => shown.filter(name => short(table[name][at])).map(name => `${name}: ${short(table[name][at])}`).join("\n");
  const legend = make("p", {class: "legend"}), order = table.x.map((_, at) => at).sort((a, b) => isTest(a) - isTest(b));
  let colors = coloring(table[choices[0]], palette), spots = [], here = -1, every = false;
  const members = new Map();  // points of each class
  table.class.forEach((name, at) => members.set(name, [...(members.get(name) ?? []), at]));
  const many = 30;  // more lines would hide the points
  const bounds = values => [Math.min(...values), Math.max(...values)], [x0, x1] = bounds(table.x), [y0, y1] = bounds(table.y);
  const [canvas, again] = canvasIn(box, box.dataset.label, (pen, width, height, color) => {
    const scale = Math.min((width - 24) / (x1 - x0 || 1), (height - 24) / (y1 - y0 || 1));
    const left = (width - scale * (x1 - x0)) / 2, top = (height - scale * (y1 - y0)) / 2;
    spots = table.x.map((x, at) => [left + scale * (x - x0), top + scale * (y1 - table.y[at])]);
    const dark = isDark(color), hue = at => shade(colors.color(table[colors.name ?? choices[0]][at]) ?? GRAY, dark);
    const joined = every ? [...members.keys()].filter(name => members.get(name).length <= many) : [];
    if (here >= 0 && !joined.includes(table.class[here])) joined.push(table.class[here]);
    for (const name of joined) {
      const own = members.get(name), middle = [0, 1].map(axis => own.reduce((sum, at) => sum + spots[at][axis], 0) / own.length);
      pen.lineWidth = here >= 0 && name === table.class[here] ? 1.2 : .6;
      pen.globalAlpha = .6;
      for (const at of own) {
        pen.strokeStyle = hue(at);
        pen.beginPath(); pen.moveTo(...middle); pen.lineTo(...spots[at]); pen.stroke();
      }
    }
    for (const at of here < 0 ? order : [...order, here]) {
      const tested = isTest(at), [x, y] = spots[at];
      pen.beginPath(); if (table.control?.[at]) {
        pen.globalAlpha = .9; pen.lineWidth = at === here ? 3 : 1.4; pen.strokeStyle = color("--ink");
        for (const way of [-3.5, 3.5]) { pen.moveTo(x - 3.5, y - way); pen.lineTo(x + 3.5, y + way); }
        pen.stroke(); continue;
      }
      pen.arc(x, y, tested ? 5 : 3.2, 0, 2 * Math.PI);
      pen.globalAlpha = tested ? .9 : .75;
      if (tested) { pen.fillStyle = hue(at); pen.fill(); }
      pen.lineWidth = tested ? 1 : 1.4;
      pen.strokeStyle = at === here ? color("--ink") : tested ? color("--ground") : hue(at);
      if (at === here) { pen.lineWidth = 3; pen.globalAlpha = 1; }
      pen.stroke();
    }
    pen.globalAlpha = 1;
  });
  function picture(at) {
    if (!box.dataset.atlas || table.picture[at] < 0) return null;
    const side = +box.dataset.side, across = +box.dataset.across, node = make("i"), number = table.picture[at];
    Object.assign(node.style, {width: `${2 * side}px`, height: `${2 * side}px`, backgroundImage: `url(${box.dataset.atlas})`,
      backgroundSize: `${2 * side * across}px`, backgroundPosition: `-${2 * side * (number % across)}px -${2 * side * Math.floor(number / across)}px`});
    return node;
  }
  function point(at, x, y) {
    here = at;
    again();
    if (at < 0) return hideTip();
    const area = canvas.getBoundingClientRect();
    showTip(x ?? area.left + spots[at][0], y ?? area.top + spots[at][1], text(at), picture(at));
  }
  canvas.addEventListener("pointermove", event => {
    const area = canvas.getBoundingClientRect(), x = event.clientX - area.left, y = event.clientY - area.top;
    let best = -1, least = 144;
    spots.forEach(([a, b], at) => { const d = (a - x) ** 2 + (b - y) ** 2; if (d < least) { least = d; best = at; } });
    point(best, event.clientX, event.clientY);
  });
  canvas.addEventListener("pointerleave", () => point(-1));
  canvas.addEventListener("keydown", event => {
    const step = {ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1}[event.key];
    if (step) { event.preventDefault(); point((Math.max(here, -1) + step + spots.length) % spots.length); }
  });
  const paint = name => { colors = coloring(table[name], name === choices[0] ? palette : null); colors.name = name; legend.replaceChildren(...colors.legend); again(); };
  const join = make("input", {type: "checkbox"});
  join.addEventListener("change", () => { every = join.checked; again(); });
  box.append(make("div", {class: "tools"}, chooser("color", choices, paint), make("label", {}, join, " join replicates"), legend), canvas);
  paint(choices[0]);
}
const WIDGETS = {plates, confusion, scatter};
for (const box of all("[data-widget]")) WIDGETS[box.dataset.widget](box);

// Open the target of a link; open everything for printing.
function unfold() {
  const target = location.hash.length > 1 && document.getElementById(decodeURIComponent(location.hash.slice(1)));
  const inside = target && target.querySelector(":scope > details");  // a folded section
  for (let node = inside || target; node; node = node.parentElement) if (node.tagName === "DETAILS") node.open = true;
  if (target) target.scrollIntoView();
}
addEventListener("hashchange", unfold);
unfold();
addEventListener("beforeprint", () => { all("details").forEach(node => { node.open = true; }); all("button.more").forEach(node => node.click()); });
for (const button of all("button.theme")) button.addEventListener("click", () => {
  const root = document.documentElement, dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
  document.dispatchEvent(new Event("theme"));
});
})();
