// RWKV-SAM in the browser. One script, two roles: the page, and the worker that runs the graphs. Served by
// `fastsam-rwkv serve`, the page asks the server instead of a worker.
// The contract of the graphs is in export/README.md of fastsam_rwkv: names, shapes, frames and steps.

const SERVER = "{server}" === "yes";
const RUNTIME = "{runtime}"; // folder of onnxruntime-web's files
const MEAN = [123.675, 116.28, 103.53];
const STD = [58.395, 57.12, 57.375];

// ---------------------------------------------------------------- arithmetic, as Pillow and PyTorch resize

// Weights of a triangle filter that is widened when it shrinks, as Pillow's BILINEAR: [first, weights] for each output.
export function triangle(from, to) {
  const scale = from / to, width = Math.max(scale, 1);
  return Array.from({ length: to }, (_, i) => {
    const center = (i + 0.5) * scale;
    const first = Math.max(0, Math.trunc(center - width + 0.5));
    const last = Math.min(from, Math.trunc(center + width + 0.5));
    const weights = [];
    for (let j = first; j < last; j++) weights.push(Math.max(0, 1 - Math.abs((j + 0.5 - center) / width)));
    const sum = weights.reduce((a, b) => a + b, 0);
    return [first, weights.map((w) => w / sum)];
  });
}

// RGBA bytes [h, w, 4] to RGB bytes [H, W, 3]. Rows are rounded to bytes between the passes, as in Pillow.
export function resizePixels(rgba, h, w, H, W) {
  const columns = triangle(w, W), rows = triangle(h, H);
  const narrow = new Uint8ClampedArray(h * W * 3);
  for (let y = 0; y < h; y++) {
    for (let x = 0; x < W; x++) {
      const [first, weights] = columns[x];
      let r = 0, g = 0, b = 0, p = (y * w + first) * 4;
      for (const weight of weights) {
        r += weight * rgba[p];
        g += weight * rgba[p + 1];
        b += weight * rgba[p + 2];
        p += 4;
      }
      const q = (y * W + x) * 3;
      narrow[q] = r + 0.5 | 0;
      narrow[q + 1] = g + 0.5 | 0;
      narrow[q + 2] = b + 0.5 | 0;
    }
  }
  const out = new Uint8Array(H * W * 3), line = new Float32Array(W * 3);
  for (let y = 0; y < H; y++) {
    const [first, weights] = rows[y];
    line.fill(0.5);
    weights.forEach((weight, i) => {
      const start = (first + i) * W * 3;
      for (let x = 0; x < W * 3; x++) line[x] += weight * narrow[start + x];
    });
    out.set(line, y * W * 3); // truncates
  }
  return out;
}

// Logits [h, w], of which the upper left [sh, sw] are used, to [H, W]; bilinear between pixel centers.
export function resizeLogits(low, w, sh, sw, H, W) {
  const axis = (from, to) => Array.from({ length: to }, (_, i) => {
    const at = Math.max(0, (i + 0.5) * from / to - 0.5), first = Math.min(Math.floor(at), from - 1);
    return [first, Math.min(first + 1, from - 1), at - first];
  });
  const columns = axis(sw, W), out = new Float32Array(H * W);
  axis(sh, H).forEach(([top, bottom, v], y) => {
    for (let x = 0; x < W; x++) {
      const [left, right, u] = columns[x];
      const above = low[top * w + left] * (1 - u) + low[top * w + right] * u;
      const below = low[bottom * w + left] * (1 - u) + low[bottom * w + right] * u;
      out[y * W + x] = above * (1 - v) + below * v;
    }
  });
  return out;
}

// The frame of an image of H x W pixels in a model input of S: [height, width, scale].
export function frameOf(H, W, S) {
  const scale = S / Math.max(H, W);
  const side = (pixels) => Math.max(1, Math.floor(pixels * scale + 0.5));
  return [side(H), side(W), scale];
}

// ---------------------------------------------------------------- worker

async function download(name, bytes, report) {
  const response = await fetch(name);
  if (!response.ok) throw new Error(`${name} cannot be loaded (${response.status})`);
  const parts = [];
  for (const reader = response.body.getReader(); ;) {
    const { done, value } = await reader.read();
    if (done) break;
    parts.push(value);
    report(value.length);
  }
  const data = new Uint8Array(await new Blob(parts).arrayBuffer());
  if (data.length !== bytes) throw new Error(`${name} has ${data.length} bytes, not ${bytes}; load the page again`);
  return data;
}

function startWorker() {
  let ort, encoder, decoder, maps, manifest;

  const calls = {
    async load({ device }) {
      manifest = await (await fetch("export.json")).json();
      const names = ["encoder.onnx", "decoder.onnx"];
      const total = names.reduce((sum, name) => sum + manifest.files[name].bytes, 0);
      let loaded = 0;
      const report = (bytes) => postMessage({ progress: loaded += bytes, total });
      const library = new URL(RUNTIME, self.location.href);
      const [files] = await Promise.all([
        Promise.all(names.map((name) => download(name, manifest.files[name].bytes, report))),
        import(new URL(device === "webgpu" ? "ort.webgpu.min.mjs" : "ort.wasm.min.mjs", library)).then((m) => { ort = m; }),
      ]);
      ort.env.wasm.wasmPaths = library.href;
      ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency || 1) : 1;
      ort.env.logLevel = "error";
      const options = { executionProviders: [device], graphOptimizationLevel: "all" };
      encoder = await ort.InferenceSession.create(files[0], options);
      decoder = await ort.InferenceSession.create(files[1], options);
      const threads = ort.env.wasm.numThreads;
      return { size: manifest.image_size, where: `${device}, ${threads} ${threads === 1 ? "thread" : "threads"}` };
    },

    async encode({ pixels, h, w }) {
      const S = manifest.image_size;
      const image = new Float32Array(3 * S * S);
      for (let c = 0; c < 3; c++)
        for (let y = 0; y < h; y++)
          for (let x = 0; x < w; x++)
            image[(c * S + y) * S + x] = (pixels[(y * w + x) * 3 + c] - MEAN[c]) / STD[c];
      maps = await encoder.run({ image: new ort.Tensor("float32", image, [1, 3, S, S]) });
      return {};
    },

    async decode({ points, labels, box, mask, scale, ambiguous }) {
      const side = manifest.image_size / 4, coords = points.flat().map((value) => value * scale);
      if (box) coords.push(...box.map((value) => value * scale));
      else coords.push(0, 0);
      labels = [...labels, ...(box ? [2, 3] : [-1])];
      const tensor = (data, dims) => new ort.Tensor("float32", Float32Array.from(data), dims);
      const given = {
        ...maps,
        point_coords: tensor(coords, [1, labels.length, 2]),
        point_labels: tensor(labels, [1, labels.length]),
        mask_input: tensor(mask ?? new Float32Array(side * side), [1, 1, side, side]),
        has_mask_input: tensor([mask ? 1 : 0], [1]),
      };
      const { low_res_masks, iou_predictions } = await decoder.run(given);
      const scores = iou_predictions.data;
      let best = 0;
      if (ambiguous) // the best of three
        for (let i = 1; i < scores.length; i++) if (best === 0 || scores[i] > scores[best]) best = i;
      return { low: low_res_masks.data.slice(best * side * side, (best + 1) * side * side), score: scores[best] };
    },
  };

  let last = Promise.resolve(); // one call at a time
  self.onmessage = ({ data: { id, name, values } }) => {
    last = last.then(async () => {
      const start = performance.now();
      try {
        const result = await calls[name](values);
        postMessage({ id, result, ms: performance.now() - start });
      } catch (error) {
        postMessage({ id, error: error?.message ?? String(error) });
      }
    });
  };
}

// ---------------------------------------------------------------- server

// The worker's calls, answered by `fastsam-rwkv serve`.
function serverCalls() {
  const token = new URLSearchParams(location.hash.slice(1)).get("token");
  let model, photo, id;

  async function ask(path, body, json = false) {
    const headers = { ...(token && { Authorization: `Bearer ${token}` }), ...(json && { "Content-Type": "application/json" }) };
    const response = await fetch(path, { method: body ? "POST" : "GET", headers, body: json ? JSON.stringify(body) : body });
    if (response.ok) return response.json();
    const reason = (await response.json().catch(() => ({}))).detail ?? `the server answers ${response.status}`;
    const remedy = response.status === 401 ? "; open this page with #token=TOKEN at the end of its address" : "";
    throw Object.assign(new Error(reason + remedy), { status: response.status });
  }

  const bytesOf = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const textOf = (bytes) => btoa(Array.from(bytes, (byte) => String.fromCharCode(byte)).join(""));

  return {
    async load() {
      model = await ask("v1/model");
      return { size: model.image_size, where: `${model.variant}, ${model.device} of the server` };
    },

    async encode({ blob }) {
      const form = new FormData();
      form.append("image", photo = blob);
      ({ id } = await ask("v1/embeddings", form));
      return {};
    },

    async decode({ points, labels, box, mask, ambiguous }) {
      const side = model.image_size / 4;
      const prompt = { low_res_logits: true, multimask_output: ambiguous && model.multimask };
      if (points.length) Object.assign(prompt, { point_coords: points, point_labels: labels });
      if (box) prompt.box = box;
      if (mask) prompt.mask_input = { shape: [1, side, side], data: textOf(new Uint8Array(mask.buffer)) };
      const answer = () => ask(`v1/embeddings/${id}/masks`, prompt, true);
      const { masks } = await answer().catch(async (error) => {
        if (error.status !== 404) throw error;
        await this.encode({ blob: photo }); // the server dropped it
        return answer();
      });
      const best = masks.reduce((a, b) => (b.score > a.score ? b : a));
      return { low: new Float32Array(bytesOf(best.low_res_logits.data).buffer), score: best.score };
    },
  };
}

// ---------------------------------------------------------------- page

const LARGEST_VIEW = 1600; // pixels of the canvas
const LARGEST_IMAGE = 50e6; // pixels
const HOVER_MS = 250; // a preview is shown if the decoder takes less

function startPage() {
  const element = (id) => document.getElementById(id);
  const view = element("view"), status = element("status"), bar = element("progress"), stage = element("stage");
  const device = new URLSearchParams(location.search).get("device") === "webgpu" ? "webgpu" : "wasm";
  const pending = new Map(), server = SERVER && serverCalls();
  let worker, next = 0, model, modelError;
  let photo = null; // {bitmap, blob, H, W}, and once it is encoded {frame, encodeMs}
  let steps = []; // clicks and boxes, each with the logits of the answer to all up to it
  let shown = null, hover = null, cross = null, drag = null, corner = null, decodeMs = Infinity, turn = 0;
  let adding = 0, previewing = false, queue = Promise.resolve();

  function say(text, error = false) {
    status.textContent = text;
    status.classList.toggle("error", error);
  }

  async function call(name, values = {}, transfer = []) {
    if (server) {
      const start = performance.now(), result = await server[name](values);
      return { ...result, ms: performance.now() - start };
    }
    return new Promise((resolve, reject) => {
      pending.set(++next, { resolve, reject });
      worker.postMessage({ id: next, name, values }, transfer);
    });
  }

  function start() {
    if (!server && !startsWorker()) return;
    call("load", { device }).then((found) => {
      model = found;
      if (photo) encode();
      else say(`Ready: ${found.size} pixels, ${found.where}.`);
    }, (error) => fail(`The model cannot be loaded: ${error.message.includes("f16")
      ? "this GPU has no 16-bit floats. Open the page without ?device=webgpu, or export it with --precision fp32."
      : error.message}`));
  }

  function startsWorker() {
    const simd = new Uint8Array([0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 10, 1, 8, 0, 65, 0, 253, 15, 253, 98, 11]);
    if (typeof WebAssembly !== "object" || !WebAssembly.validate(simd)) {
      modelError = "This browser has no WebAssembly SIMD, which the model needs. Use a current Chrome, Edge, Firefox or Safari.";
      say(modelError, true);
      return false;
    }
    worker = new Worker(new URL("app.js", import.meta.url), { type: "module" });
    worker.onerror = (event) => fail(`The model cannot start: ${event.message ?? "its script did not load"}`);
    worker.onmessage = ({ data }) => {
      if ("progress" in data) {
        if (modelError) return; // of a file that still loads
        bar.hidden = data.progress >= data.total;
        bar.value = data.progress / data.total;
        const mb = (bytes) => (bytes / 1e6).toFixed(1);
        say(data.progress < data.total ? `Loading the model: ${mb(data.progress)} of ${mb(data.total)} MB` : "Starting the model …");
        return;
      }
      const { resolve, reject } = pending.get(data.id);
      pending.delete(data.id);
      if (data.error) reject(new Error(data.error));
      else resolve({ ...data.result, ms: data.ms });
    };
    return true;
  }

  function fail(message) {
    modelError = message;
    bar.hidden = true;
    say(message, true);
  }

  async function open(blob, name) {
    let bitmap;
    try {
      bitmap = await createImageBitmap(blob, { imageOrientation: "from-image" });
    } catch {
      say(`${name} is no image that this browser can read.`, true);
      return;
    }
    if (bitmap.width * bitmap.height > LARGEST_IMAGE) {
      say(`${name} has ${(bitmap.width * bitmap.height / 1e6).toFixed(0)} million pixels; at most ${LARGEST_IMAGE / 1e6} million are taken.`, true);
      return;
    }
    const factor = Math.min(1, LARGEST_VIEW / Math.max(bitmap.width, bitmap.height));
    photo = { bitmap, blob, H: bitmap.height, W: bitmap.width };
    view.width = Math.max(1, Math.round(bitmap.width * factor));
    view.height = Math.max(1, Math.round(bitmap.height * factor));
    view.hidden = false;
    element("hint").hidden = true;
    reset();
    if (modelError) say(modelError, true);
    else if (model) await encode();
  }

  async function encode() {
    const mine = photo;
    say("Encoding the photograph …");
    mine.frame = frameOf(mine.H, mine.W, model.size);
    try {
      const { ms } = server ? await call("encode", mine) : await encodeHere(mine);
      if (mine !== photo) return;
      mine.encodeMs = ms;
      say(`Encoded in ${(ms / 1000).toFixed(2)} s. Click an object.`);
    } catch (error) {
      say(`The photograph cannot be encoded: ${error.message}`, true);
    }
  }

  function encodeHere(mine) {
    const canvas = new OffscreenCanvas(mine.W, mine.H), context = canvas.getContext("2d", { willReadFrequently: true });
    context.fillStyle = "#fff"; // behind transparent pixels
    context.fillRect(0, 0, mine.W, mine.H);
    context.drawImage(mine.bitmap, 0, 0);
    const rgba = context.getImageData(0, 0, mine.W, mine.H).data;
    const [h, w] = mine.frame, pixels = resizePixels(rgba, mine.H, mine.W, h, w);
    return call("encode", { pixels, h, w }, [pixels.buffer]);
  }

  // The decoder's answer to clicks and a box: the logits of one mask and its predicted IoU.
  async function decode(some, mask) {
    const clicks = some.filter((step) => step.point), box = some.findLast((step) => step.box)?.box;
    const points = clicks.map((step) => step.point), labels = clicks.map((step) => step.label);
    const ambiguous = some.length === 1 && !box;
    const found = await call("decode", { points, labels, box, mask, scale: photo.frame[2], ambiguous });
    decodeMs = found.ms;
    return found;
  }

  function add(step) {
    const number = turn; // undo and clear drop what is on its way
    if (!photo?.encodeMs) return;
    hover = null;
    adding++;
    queue = queue.then(() => number === turn ? answer(step, number) : null).finally(() => adding--);
  }

  async function answer(step, number) {
    const mine = photo, before = steps.at(-1)?.low ?? null, all = [...steps, step];
    if (step.label === 0 && !before) {
      say("Mark the object first, then what does not belong to it.");
      return;
    }
    say("Segmenting …");
    try {
      const { low, score, ms } = await decode(all, before);
      if (number !== turn) return;
      steps = [...all.slice(0, -1), { ...step, low, score }];
      show(low);
      say(`Encoder ${(mine.encodeMs / 1000).toFixed(2)} s, decoder ${(ms / 1000).toFixed(2)} s. Predicted IoU ${score.toFixed(2)}.`);
    } catch (error) {
      say(`The mask cannot be computed: ${error.message}`, true);
    }
  }

  // Logits of a mask at H x W, as `resize_masks` of the package computes them.
  function enlarged(low, H, W) {
    const S = model.size, [h, w] = photo.frame;
    return resizeLogits(resizeLogits(low, S / 4, S / 4, S / 4, S, S), S, h, w, H, W);
  }

  function maskImage(low, H, W, paint) {
    const logits = enlarged(low, H, W), image = new ImageData(W, H);
    logits.forEach((logit, i) => paint(image.data, 4 * i, logit > 0));
    return image;
  }

  function show(low, alpha = 120) {
    shown = null;
    if (low) {
      const image = maskImage(low, view.height, view.width, (data, i, inside) => {
        if (inside) [data[i], data[i + 1], data[i + 2], data[i + 3]] = [30, 144, 255, alpha];
      });
      shown = new OffscreenCanvas(view.width, view.height);
      shown.getContext("2d").putImageData(image, 0, 0);
    }
    draw();
    element("undo").disabled = element("clear").disabled = element("save").disabled = steps.length === 0;
  }

  function draw() {
    const context = view.getContext("2d"), fx = view.width / photo.W, fy = view.height / photo.H;
    const unit = Math.max(view.width, view.height) / 250;
    context.drawImage(photo.bitmap, 0, 0, view.width, view.height);
    if (shown) context.drawImage(shown, 0, 0);
    context.lineWidth = unit;
    const rectangle = ([x1, y1, x2, y2]) => context.strokeRect(x1 * fx, y1 * fy, (x2 - x1) * fx, (y2 - y1) * fy);
    context.strokeStyle = "#2ecc71";
    for (const { box } of steps) if (box) rectangle(box);
    if (drag?.box) rectangle(drag.box);
    if (corner && cross) rectangle(ordered(corner, cross));
    for (const { point, label } of steps) {
      if (!point) continue;
      context.beginPath();
      context.arc(point[0] * fx, point[1] * fy, 2 * unit, 0, 2 * Math.PI);
      context.fillStyle = label ? "#2ecc71" : "#e74c3c";
      context.strokeStyle = "#fff";
      context.fill();
      context.stroke();
    }
    if (cross) {
      context.strokeStyle = "#fff";
      context.beginPath();
      context.moveTo(cross[0] * fx - 5 * unit, cross[1] * fy);
      context.lineTo(cross[0] * fx + 5 * unit, cross[1] * fy);
      context.moveTo(cross[0] * fx, cross[1] * fy - 5 * unit);
      context.lineTo(cross[0] * fx, cross[1] * fy + 5 * unit);
      context.stroke();
    }
  }

  function reset() {
    turn++;
    steps = [];
    hover = cross = drag = corner = null;
    show(null);
  }

  function undo() {
    if (!steps.length) return;
    turn++;
    steps = steps.slice(0, -1);
    show(steps.at(-1)?.low);
    say(steps.length ? "Taken back." : "Click an object.");
  }

  async function save() {
    const image = maskImage(steps.at(-1).low, photo.H, photo.W, (data, i, inside) => {
      data[i] = data[i + 1] = data[i + 2] = inside ? 255 : 0;
      data[i + 3] = 255;
    });
    const canvas = new OffscreenCanvas(photo.W, photo.H);
    canvas.getContext("2d").putImageData(image, 0, 0);
    const link = document.createElement("a");
    link.href = URL.createObjectURL(await canvas.convertToBlob({ type: "image/png" }));
    link.download = "mask.png";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  }

  function position(event) {
    const r = view.getBoundingClientRect();
    const at = (value, from, length, pixels) => Math.min(Math.max((value - from) / length, 0), 1) * pixels;
    return [at(event.clientX, r.left, r.width, photo.W), at(event.clientY, r.top, r.height, photo.H)];
  }

  function ordered(a, b) {
    return [Math.min(a[0], b[0]), Math.min(a[1], b[1]), Math.max(a[0], b[0]), Math.max(a[1], b[1])];
  }

  function labelOf(event) {
    const pressed = element("background").getAttribute("aria-pressed") === "true";
    return event.shiftKey || event.button === 2 || pressed ? 0 : 1;
  }

  view.addEventListener("pointerdown", (event) => {
    if (!photo) return;
    view.setPointerCapture(event.pointerId);
    cross = corner = null;
    drag = { from: position(event), x: event.clientX, y: event.clientY, box: null };
  });
  view.addEventListener("pointermove", async (event) => {
    if (!photo?.encodeMs) return;
    if (drag) {
      if (Math.hypot(event.clientX - drag.x, event.clientY - drag.y) > 6) {
        drag.box = ordered(drag.from, position(event));
        draw();
      }
      return;
    }
    if (event.pointerType !== "mouse" || steps.length || adding || previewing || decodeMs > HOVER_MS) return;
    const mine = hover = { point: position(event), label: 1 }, number = turn;
    previewing = true; // one at a time
    try {
      const { low } = await decode([mine], null);
      if (number === turn && hover === mine && !drag) show(low, 70);
    } catch (error) {
      say(`The preview cannot be computed: ${error.message}`, true);
    }
    previewing = false;
  });
  view.addEventListener("pointerup", (event) => {
    if (!drag) return;
    const { from, box } = drag;
    drag = null;
    if (box && (box[2] - box[0] < 1 || box[3] - box[1] < 1)) draw();
    else add(box ? { box } : { point: from, label: labelOf(event) });
  });
  view.addEventListener("pointercancel", () => { drag = null; });
  view.addEventListener("pointerleave", () => {
    if (!hover) return; // a tap also ends with this event, while its mask is computed
    hover = null;
    show(steps.at(-1)?.low);
  });
  view.addEventListener("contextmenu", (event) => event.preventDefault());
  view.addEventListener("keydown", (event) => {
    if (!photo) return;
    const step = (event.ctrlKey ? 0.1 : 0.01) * Math.max(photo.H, photo.W);
    const moves = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] };
    cross ??= [photo.W / 2, photo.H / 2];
    if (moves[event.key]) {
      const [x, y] = moves[event.key];
      cross = [Math.min(Math.max(cross[0] + x, 0), photo.W - 1), Math.min(Math.max(cross[1] + y, 0), photo.H - 1)];
      draw();
    } else if (event.key === "Enter") {
      add({ point: [...cross], label: labelOf(event) });
    } else if (event.key === "b" || event.key === "B") {
      if (corner) {
        const box = ordered(corner, cross);
        corner = null;
        if (box[2] > box[0] && box[3] > box[1]) add({ box });
      } else {
        corner = [...cross];
      }
      draw();
    } else if (event.key === "Backspace") {
      undo();
    } else {
      return;
    }
    event.preventDefault();
  });
  document.addEventListener("keydown", (event) => {
    if ((event.ctrlKey || event.metaKey) && event.key === "z") undo();
  });

  element("file").addEventListener("change", ({ target }) => {
    if (target.files[0]) open(target.files[0], target.files[0].name);
    target.value = "";
  });
  element("example").addEventListener("click", async () => open(await (await fetch("example.jpg")).blob(), "The example"));
  element("background").addEventListener("click", ({ target }) => {
    target.setAttribute("aria-pressed", target.getAttribute("aria-pressed") !== "true");
  });
  element("undo").addEventListener("click", undo);
  element("clear").addEventListener("click", () => { reset(); say("Click an object."); });
  element("save").addEventListener("click", save);
  for (const name of ["dragover", "dragleave", "drop"])
    document.addEventListener(name, (event) => {
      event.preventDefault();
      stage.classList.toggle("over", name === "dragover");
      const file = name === "drop" && event.dataTransfer.files[0];
      if (file) open(file, file.name);
    });
  start();
}

if (typeof document !== "undefined") startPage();
else if (typeof WorkerGlobalScope !== "undefined") startWorker();
