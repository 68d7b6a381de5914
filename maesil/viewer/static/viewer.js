// The page of one volume: NiiVue draws three planes, this script tells where one is and what lies there.
// Positions are mm LPS (x to the left, y to the back, z to the head), indices are z, y, x, as everywhere in maesil.
"use strict";

const scan = JSON.parse(document.getElementById("scan").textContent);
const find = (id) => document.getElementById(id);
const all = (selector) => [...document.querySelectorAll(selector)];
const clamped = (value, low, high) => Math.min(Math.max(value, low), high);

const SIDES = ["LR", "PA", "SI"];
const COLOURS = { valid: [60, 200, 110], body: [255, 150, 40] };

const nv = new niivue.Niivue({
  isRadiologicalConvention: true, // the patient's left at the right, as if seen from the feet
  sagittalNoseLeft: true,
  isSliceMM: true, // what is turned is drawn turned: a plane of its voxels, each at its place in the patient
  multiplanarShowRender: niivue.SHOW_RENDER.NEVER,
  multiplanarPadPixels: 6,
  showAllOrientationMarkers: true,
  fontColor: [1, 0.65, 0.1, 1], // to be seen on black and on white,
  crosshairColor: [0.3, 0.75, 1, 0.8],
  crosshairWidthUnit: "mm",
  crosshairGap: 6,
  dragMode: niivue.DRAG_MODE.windowing,
  dragAndDropEnabled: false,
  viewModeHotKey: "",
  clipPlaneHotKey: "",
  cycleClipPlaneHotKey: "",
  loadingText: "",
  logLevel: "error",
});
const overlays = new Map(); // place in scan.overlays -> what NiiVue made of it

function say(text, failed = false) {
  find("readout").textContent = text;
  find("readout").classList.toggle("failed", failed);
}

// Where, and what is there.

const toLps = (ras) => [-ras[0], -ras[1], ras[2]];
const side = (value, axis) => `${SIDES[axis][value >= 0 ? 0 : 1]} ${Math.abs(value).toFixed(1)}`;

function voxelAt(lps) {
  return scan.index_of_lps.map((row) => Math.round(row[0] * lps[0] + row[1] * lps[1] + row[2] * lps[2] + row[3]));
}

function huAt(index) {
  const [, height, width] = scan.shape;
  const inside = index.every((at, axis) => at >= 0 && at < scan.shape[axis]);
  return inside ? nv.volumes[0].img[(index[0] * height + index[1]) * width + index[2]] : null;
}

function told(lps) {
  const index = voxelAt(lps);
  const hu = huAt(index);
  if (hu === null) return "outside the scan";
  const stored = index.map((at, axis) => at * scan.step[axis]);
  return `${hu} HU at ${lps.map(side).join("  ")} mm, voxel ${stored.join(", ")} (z, y, x)`;
}

function crosshair() {
  return toLps(nv.frac2mm(nv.scene.crosshairPos, 0, true));
}

function goTo(lps) {
  const within = lps.map((value, axis) => clamped(value, scan.lowest[axis], scan.highest[axis]));
  const frac = nv.mm2frac([-within[0], -within[1], within[2]], 0, true);
  nv.scene.crosshairPos = frac.map((value) => clamped(value, 0, 1));
  nv.drawScene();
  nv.createOnLocationChange();
}

function located(location) {
  const lps = crosshair();
  const over = [...overlays].map(([place, image]) => {
    const value = location.values[nv.volumes.indexOf(image)]?.value;
    return `; ${scan.overlays[place].name} ${overlayTold(scan.overlays[place], value)}`;
  });
  say(told(lps) + over.join(""));
  for (const slider of all("[data-axis]")) {
    const axis = Number(slider.dataset.axis);
    slider.value = lps[axis];
    slider.setAttribute("aria-valuetext", `${side(lps[axis], axis)} mm`);
  }
}

function overlayTold(overlay, value) {
  if (overlay.classes) return overlay.classes.find((one) => one.number === value)?.name ?? "background";
  return `${Math.round((100 * (value || 0)) / 255)} %`;
}

function pointed(event) {
  const scale = canvas.width / canvas.clientWidth;
  const frac = nv.canvasPos2frac([event.offsetX * scale, event.offsetY * scale]);
  const off = frac.some((value) => value < 0 || value > 1);
  find("under").textContent = off ? "\u00a0" : `under the cursor: ${told(toLps(nv.frac2mm(frac, 0, true)))}`;
}

// Windows, planes, overlays.

function window_(low, high) {
  nv.volumes[0].cal_min = low;
  nv.volumes[0].cal_max = high;
  nv.updateGLVolume();
  windowed(low, high);
}

function windowed(low, high) {
  find("low").value = Math.round(low);
  find("high").value = Math.round(high);
  for (const button of all("[data-window]")) {
    const preset = scan.windows[button.dataset.window];
    button.setAttribute("aria-pressed", String(preset.low === low && preset.high === high));
  }
}

function preset(place) {
  const chosen = scan.windows[place];
  if (chosen) window_(chosen.low, chosen.high);
}

function typedWindow() {
  const [low, high] = [Number(find("low").value), Number(find("high").value)];
  if (high > low) window_(low, high);
}

function plane(button) {
  const types = niivue.SLICE_TYPE;
  const chosen = { All: types.MULTIPLANAR, Axial: types.AXIAL, Coronal: types.CORONAL, Sagittal: types.SAGITTAL };
  nv.setSliceType(chosen[button.dataset.plane]);
  for (const other of all("[data-plane]")) other.setAttribute("aria-pressed", String(other === button));
  fitCrosshair();
}

// NiiVue draws a crosshair of mm. Below a pixel and a half parts of it would vanish between the pixels.
function fitCrosshair() {
  const pixels = nv.screenSlices.map((tile) => Math.abs(tile.fovMM[0]) / tile.leftTopWidthHeight[2]);
  nv.setCrosshairWidth(1.6 * Math.max(...pixels));
}

async function lay(box) {
  const place = Number(box.dataset.overlay);
  const overlay = scan.overlays[place];
  if (!box.checked) {
    nv.removeVolume(overlays.get(place));
    overlays.delete(place);
  } else {
    box.disabled = true;
    const highest = overlay.classes ? addLabelColours(overlay) : 255;
    const image = await loaded(overlay.address, overlay.name, {
      colormap: overlay.classes ? `labels ${overlay.name}` : overlay.name,
      opacity: Number(find("opacity").value),
      cal_min: 0,
      cal_max: highest,
    });
    overlays.set(place, image);
    box.disabled = false;
  }
  legend();
  nv.createOnLocationChange();
}

// NiiVue reads a colour table of 256 entries between one entry and the next. So each number has two of them or more,
// as far as there are at most 126 numbers. Returns what the last entry stands for.
function addLabelColours(overlay) {
  const seen = overlay.classes.filter((one) => one.colour[3]);
  const spread = Math.max(1, Math.floor(255 / (Math.max(0, ...seen.map((one) => one.number)) + 1)));
  const colours = new Map(seen.map((one) => [one.number, one.colour]));
  const entries = Array.from({ length: 256 }, (_, entry) => colours.get(Math.floor(entry / spread)) ?? [0, 0, 0, 0]);
  const [R, G, B, A] = [0, 1, 2, 3].map((channel) => entries.map((colour) => colour[channel]));
  nv.addColormap(`labels ${overlay.name}`, { R, G, B, A, I: entries.map((_, entry) => entry) });
  return 255 / spread;
}

function legendOf(overlay) {
  if (!overlay.classes) return [[COLOURS[overlay.name], `${overlay.name}: the more of a cell of 8 voxels, the stronger`]];
  return overlay.classes.filter((one) => one.colour[3]).map((one) => [one.colour.slice(0, 3), one.name]);
}

function legend() {
  find("legend").replaceChildren(...[...overlays.keys()].flatMap((place) => legendOf(scan.overlays[place])).map(([colour, name]) => {
    const item = document.createElement("li");
    const patch = document.createElement("span");
    patch.style.background = `rgb(${colour.join()})`;
    item.append(patch, name);
    return item;
  }));
}

function opacity() {
  for (const image of overlays.values()) nv.setOpacity(nv.volumes.indexOf(image), Number(find("opacity").value));
}

// Keys.

const MOVES = {
  ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [1, -1], ArrowDown: [1, 1], PageUp: [2, 1], PageDown: [2, -1],
};

function moved(event) {
  event.stopImmediatePropagation(); // NiiVue has other keys, which nobody here asked for
  const move = MOVES[event.key];
  if (!move || event.ctrlKey || event.altKey || event.metaKey) return;
  event.preventDefault();
  const [axis, way] = move;
  const lps = crosshair();
  lps[axis] += way * scan.spacing[2 - axis];
  goTo(lps);
}

function typed(event) {
  const typing = event.target instanceof HTMLInputElement && event.target.type === "number";
  if (typing || event.ctrlKey || event.altKey || event.metaKey || !/^[1-9]$/.test(event.key)) return;
  preset(Number(event.key) - 1);
}

// Loading.

async function bytesOf(address, tell) {
  const response = await fetch(address);
  if (!response.ok) throw new Error((await response.text()).trim());
  const whole = new Uint8Array(Number(response.headers.get("Content-Length")));
  const reader = response.body.getReader();
  for (let have = 0; ; ) {
    const { done, value } = await reader.read();
    if (done) return whole.buffer;
    whole.set(value, have);
    have += value.length;
    tell(`Loading: ${Math.round(have / 1e6)} of ${Math.round(whole.length / 1e6)} MB`);
  }
}

async function loaded(address, name, options) {
  const buffer = await bytesOf(address, overlays.size || nv.volumes.length ? () => {} : say);
  return nv.addVolumeFromUrl({ url: `${name}.nii`, name: `${name}.nii`, buffer, ...options });
}

function listen() {
  nv.onLocationChange = located;
  nv.onIntensityChange = (image) => windowed(image.cal_min, image.cal_max);
  canvas.addEventListener("mousemove", pointed);
  canvas.addEventListener("mouseleave", () => (find("under").textContent = "\u00a0"));
  canvas.addEventListener("keydown", moved, true);
  document.addEventListener("keydown", typed, true);
  for (const button of all("[data-window]")) button.onclick = () => preset(button.dataset.window);
  for (const button of all("[data-plane]")) button.onclick = () => plane(button);
  for (const box of all("[data-overlay]")) box.onchange = () => lay(box).catch(failed);
  for (const id of ["low", "high"]) find(id).onchange = typedWindow;
  find("opacity").oninput = opacity;
  new ResizeObserver(() => requestAnimationFrame(fitCrosshair)).observe(canvas);
  for (const slider of all("[data-axis]")) {
    const axis = Number(slider.dataset.axis);
    Object.assign(slider, { min: scan.lowest[axis], max: scan.highest[axis], step: scan.spacing[2 - axis] });
    slider.oninput = () => {
      const lps = crosshair();
      lps[axis] = Number(slider.value);
      goTo(lps);
    };
  }
}

function failed(error) {
  say(error.message || String(error), true);
}

async function start() {
  if (!document.createElement("canvas").getContext("webgl2")) {
    throw new Error("This browser cannot draw the planes: WebGL 2 is off or missing.");
  }
  await nv.attachToCanvas(canvas);
  for (const [name, [red, green, blue]] of Object.entries(COLOURS)) {
    nv.addColormap(name, { R: [0, red], G: [0, green], B: [0, blue], A: [0, 255], I: [0, 255] });
  }
  const first = scan.windows[1];
  await loaded(scan.ct, "ct", { colormap: "gray", cal_min: first.low, cal_max: first.high });
  listen();
  window_(first.low, first.high);
  goTo(scan.lowest.map((low, axis) => (low + scan.highest[axis]) / 2));
  document.body.dataset.ready = "yes";
}

const canvas = find("planes");
start().catch(failed);
