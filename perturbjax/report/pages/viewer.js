// Enlarged pictures: one channel at a time, brightness, outlines.
(() => {
const info = document.getElementById("channels");
const shots = [...document.querySelectorAll(".shot[data-layers]")];
if (!info || !shots.length) return;
const {name: names, color: colors, low, high} = JSON.parse(info.textContent), count = names.length;
const node = (tag, attributes = {}, ...children) => {
  const made = Object.assign(document.createElement(tag), attributes);
  made.append(...children);
  return made;
};
const canvas = node("canvas"), bar = node("span", {className: "scale-bar"}), frame = node("div", {className: "scaled"}, canvas, bar), caption = node("p"), scale = node("p", {className: "note"});
const choice = node("select", {ariaLabel: "channel"}, ...["all channels", ...names].map((text, at) => node("option", {value: at - 1}, text)));
const outlines = node("input", {type: "checkbox", checked: true});
// The layers have the value 255 at twice the contrast range, so that brightness can be reduced.
const gain = node("input", {type: "range", min: "-1", max: "3", step: "0.25", value: "0", ariaLabel: "brightness"});
const button = (text, act) => { const made = node("button", {type: "button"}, text); made.addEventListener("click", act); return made; };
const dialog = node("dialog", {className: "viewer"}, caption, frame, node("div", {className: "tools"}, node("label", {}, "channel ", choice),
  node("label", {}, "brightness ", gain), node("label", {}, outlines, " outlines"), button("previous", () => step(-1)), button("next", () => step(1)),
  button("close", () => dialog.close())), scale);
document.body.append(dialog);
let here = 0, layers = null;

// Splits the strip of gray tiles into one array for each channel and one for the outlines.
async function open(at) {
  here = at;
  const picture = new Image();
  picture.src = shots[at].dataset.layers;
  await picture.decode();
  const width = picture.width / (count + 1), height = picture.height, own = node("canvas", {width: picture.width, height});
  const pen = own.getContext("2d", {willReadFrequently: true});
  pen.drawImage(picture, 0, 0);
  layers = {width, height, tiles: Array.from({length: count + 1}, (_, tile) => pen.getImageData(tile * width, 0, width, height).data)};
  const {bar: share, barText} = shots[at].dataset;
  bar.hidden = !share;
  bar.style.width = `${100 * (share ?? 0)}%`;
  bar.textContent = barText ?? "";
  caption.textContent = shots[at].dataset.tip || shots[at].textContent;
  if (!dialog.open) dialog.showModal();
  draw();
}
function draw() {
  const {width, height, tiles} = layers, factor = 2 * 2 ** +gain.value / 255, only = +choice.value;
  const shown = only < 0 ? names.map((_, at) => at) : [only], part = only < 0 ? Math.min(1, 3 / count) : 1;
  // A single channel is gray; several are mixed like the small pictures.
  const mix = shown.map(at => shown.length === 1 ? [1, 1, 1] : [1, 3, 5].map(from => parseInt(colors[at].slice(from, from + 2), 16) / 255));
  canvas.width = width; canvas.height = height;
  const pen = canvas.getContext("2d"), image = pen.createImageData(width, height);
  for (let pixel = 0; pixel < width * height; pixel++) {
    const edge = outlines.checked && tiles[count][4 * pixel] > 127 ? .6 : 0;
    for (let color = 0; color < 3; color++) {
      let dark = 1;
      shown.forEach((channel, at) => { dark *= 1 - part * Math.min(1, factor * tiles[channel][4 * pixel]) * mix[at][color]; });
      image.data[4 * pixel + color] = 255 * (1 - dark * (1 - edge));
    }
    image.data[4 * pixel + 3] = 255;
  }
  pen.putImageData(image, 0, 0);
  const white = at => Math.round(low[at] + (high[at] - low[at]) / 2 ** +gain.value).toLocaleString("en");
  scale.textContent = `Gray values, black to full color: ${shown.map(at => `${names[at]} ${Math.round(low[at]).toLocaleString("en")} to ${white(at)}`).join("; ")}.`;
}
const step = by => open((here + by + shots.length) % shots.length);
for (const control of [choice, gain, outlines]) control.addEventListener("input", draw);
dialog.addEventListener("keydown", event => {
  if (event.target.tagName === "INPUT" || event.target.tagName === "SELECT") return;
  if (event.key === "ArrowRight") step(1);
  if (event.key === "ArrowLeft") step(-1);
});
dialog.addEventListener("click", event => { if (event.target === dialog) dialog.close(); });
shots.forEach((shot, at) => shot.querySelector("button").addEventListener("click", () => open(at)));
})();

// Marks tables that are wider than the page.
(() => {
const mark = box => box.classList.toggle("scrolls", box.scrollWidth > box.clientWidth + 2);
const watch = new ResizeObserver(entries => entries.forEach(entry => mark(entry.target)));
for (const box of document.querySelectorAll(".wide, .tall")) watch.observe(box);
})();
