"use strict";
// Tables that sort and filter, and the graph, whose modules open and close. All text is set as text, never as markup.

for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  const value = (row, i) => {
    const cell = row.cells[i], text = cell.dataset.v ?? cell.textContent.trim().replace(/,/g, "");
    const number = parseFloat(text);
    return Number.isNaN(number) ? text : number;
  };
  const compare = (a, b) => {
    if (typeof a === typeof b) return a < b ? -1 : a > b ? 1 : 0;
    return typeof a === "number" ? -1 : 1;  // numbers come before what has none
  };
  heads.forEach((head, i) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const rows = [...table.tBodies[0].rows].sort((a, b) => compare(value(a, i), value(b, i)) * (up ? 1 : -1));
      table.tBodies[0].append(...rows);
    });
  });
}

for (const input of document.querySelectorAll("input[data-filter]")) {
  const rows = () => document.getElementById(input.dataset.filter).tBodies[0].rows;
  input.addEventListener("input", () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const row of rows()) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
    }
  });
}

(() => {
  const graph = JSON.parse(document.getElementById("graph-data").textContent);
  const view = document.getElementById("graph-view"), controls = document.getElementById("graph-controls");
  const WORDS = ["passed through", "exact", "nearest", "least squares", "projected", "damped", "failed", "no target"];
  const W = 176, H = 42, GAP_Y = 30, MOST = 30;
  const rank = (status) => status === "no target" ? -1 : WORDS.indexOf(status);

  // the modules that a node lies in, outermost first: the prefixes of its path
  const parents = (name) => name.split(".").slice(0, -1).map((_, i, parts) => parts.slice(0, i + 1).join("."));
  const own = new Map();
  graph.nodes.forEach((node, i) => {
    node.groups = parents(node.name);
    for (const group of node.groups) own.set(group, [...(own.get(group) ?? []), i]);
  });
  const closed = new Set(own.keys());
  const standsFor = (node, i) => {
    const group = node.groups.find((name) => closed.has(name));
    return group === undefined ? `n${i}` : `g${group}`;
  };
  const visible = () => new Set(graph.nodes.map(standsFor)).size;
  // open the largest modules first, as long as the picture stays legible
  for (const group of [...own.keys()].sort((a, b) => a.split(".").length - b.split(".").length || own.get(b).length - own.get(a).length)) {
    closed.delete(group);
    if (visible() > MOST) closed.add(group);
  }
  let way = "forward";

  const element = (name, attributes, parent, text) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    parent?.append(made);
    return made;
  };
  const short = (text, most) => text.length <= most ? text : text.slice(0, most / 2 - 1) + "…" + text.slice(1 - most / 2);

  function boxes() {
    const found = new Map();
    graph.nodes.forEach((node, i) => {
      const key = standsFor(node, i);
      if (!found.has(key)) {
        const group = key.startsWith("g") ? key.slice(1) : null;
        const depth = group === null ? node.groups : node.groups.slice(0, node.groups.indexOf(group));
        found.set(key, { key, group, groups: depth, members: [], order: i });
      }
      found.get(key).members.push(node);
    });
    return found;
  }

  // layers by the longest path; what would lead back (a module entered twice) is left out of it
  function layout(found) {
    const edges = new Map(), position = new Map();
    const ends = way === "forward" ? graph.forward : graph.inverse;
    for (const [a, b] of ends) {
      const from = standsFor(graph.nodes[a], a), to = standsFor(graph.nodes[b], b);
      if (from !== to) edges.set(`${from}\u0000${to}`, { from, to });
    }
    const list = [...found.values()].sort((a, b) => way === "forward" ? a.order - b.order : b.order - a.order);
    list.forEach((box, i) => { position.set(box.key, i); box.layer = 0; box.before = []; });
    for (const edge of edges.values()) {
      edge.back = position.get(edge.from) > position.get(edge.to);
      if (!edge.back) found.get(edge.to).before.push(found.get(edge.from));
    }
    const layers = [];
    for (const box of list) {
      for (const other of box.before) box.layer = Math.max(box.layer, other.layer + 1);
      (layers[box.layer] ??= []).push(box);
    }
    const gap = list.some((box) => box.groups.length) ? 140 : 40;  // frames have their names beside them
    layers.forEach((layer) => {
      for (const box of layer) {
        const xs = box.before.map((other) => other.x);
        box.wish = xs.length ? xs.reduce((a, b) => a + b, 0) / xs.length : 0;
      }
      layer.sort((a, b) => a.wish - b.wish);
      const middle = layer.reduce((sum, box) => sum + box.wish, 0) / layer.length;
      layer.forEach((box, i) => {
        box.x = middle + (i - (layer.length - 1) / 2) * (W + gap);
        box.y = box.layer * (H + GAP_Y);
      });
    });
    return [...edges.values()];
  }

  function draw() {
    const found = boxes(), edges = layout(found), list = [...found.values()];
    const svg = element("svg", { role: "img", "aria-label": `${way} graph` });
    const marker = element("marker", { id: "tip", viewBox: "0 0 8 8", refX: 7, refY: 4, markerWidth: 7, markerHeight: 7, orient: "auto" }, element("defs", {}, svg));
    element("path", { d: "M0 0 8 4 0 8z", class: "arrow" }, marker);
    frames(list, svg);
    let right = Math.max(...list.map((box) => box.x + W / 2));
    for (const { from, to, back } of edges) {
      const a = found.get(from), b = found.get(to), span = Math.abs(b.layer - a.layer);
      let d;
      if (span === 1 && !back) {
        const y = a.y + H, m = (y + b.y) / 2;
        d = `M${a.x} ${y}C${a.x} ${m} ${b.x} ${m} ${b.x} ${b.y - 1}`;
      } else {  // past what lies between
        const x = Math.max(a.x, b.x) + W / 2 + 10 + 6 * Math.min(span, 8);
        right = Math.max(right, x + 4);
        const y = a.y + H / 2, z = b.y + H / 2;
        d = `M${a.x + W / 2} ${y}C${x} ${y} ${x} ${y} ${x} ${(y + z) / 2}S${x} ${z} ${b.x + W / 2 + 1} ${z}`;
      }
      element("path", { d, class: back ? "edge back" : "edge", "marker-end": "url(#tip)" }, svg);
    }
    for (const box of list) node(box, svg);
    const depth = Math.max(0, ...list.map((box) => box.groups.length));
    const left = Math.min(...list.map((box) => box.x)) - W / 2 - 20 - 5 * depth - (depth ? 130 : 0);
    const top = -16 - 5 * depth, height = Math.max(...list.map((box) => box.y)) + H + 16 + 5 * depth - top;
    const width = right + 20 + 5 * depth - left;
    for (const [key, value] of Object.entries({ viewBox: `${left} ${top} ${width} ${height}`, width, height })) svg.setAttribute(key, value);
    view.replaceChildren(svg);
    view.scrollTop = 0;
    view.scrollLeft = (view.scrollWidth - view.clientWidth) / 2;
  }

  function frames(list, svg) {
    const deepest = Math.max(0, ...list.map((box) => box.groups.length));
    for (const group of own.keys()) {
      const inside = list.filter((box) => box.groups.includes(group));
      if (!inside.length) continue;
      const level = group.split(".").length, pad = 5 + 5 * (deepest - level);
      const x = Math.min(...inside.map((box) => box.x)) - W / 2 - pad, y = Math.min(...inside.map((box) => box.y)) - pad;
      const frame = element("g", { class: "frame", "data-group": group }, svg);
      element("rect", {
        x, y, rx: 8, width: Math.max(...inside.map((box) => box.x)) + W / 2 + pad - x,
        height: Math.max(...inside.map((box) => box.y)) + H + pad - y,
      }, frame);
      const beside = x + pad - 5 * deepest - 6;  // left of the outermost frame
      const text = element("text", { x: beside, y: y + 12 + 14 * (level - 1), "text-anchor": "end" }, frame, `− ${short(group, 20)}`);
      element("title", {}, text, `close ${group}`);
      text.addEventListener("click", () => { closed.add(group); draw(); });
    }
  }

  function node(box, svg) {
    const worst = box.members.reduce((a, b) => rank(b.status) > rank(a.status) ? b : a);
    const first = box.members[0], group = box.group !== null;
    const g = element("g", {
      class: `node s${WORDS.indexOf(worst.status)}${group ? " group" : ""}`, "data-name": group ? box.group : first.name,
      transform: `translate(${box.x - W / 2} ${box.y})`,
    }, svg);
    element("rect", { width: W, height: H, rx: 7 }, g);
    const name = group ? `+ ${box.group}` : first.name;
    element("text", { x: W / 2, y: 17, "text-anchor": "middle" }, g, short(name, 26));
    const small = group ? `${box.members.length} nodes` : `${first.op}, ${first.shape.join("×") || "1"}`;
    element("text", { x: W / 2, y: 33, "text-anchor": "middle", class: "small" }, g, short(small, 30));
    const told = group ? [box.group, `worst: ${worst.name}, ${worst.status}`] : [first.name, first.rule, first.why, first.sentence ?? first.status];
    element("title", {}, g, told.filter(Boolean).join("\n"));
    if (group) g.addEventListener("click", () => { closed.delete(box.group); draw(); });
  }

  controls.hidden = false;
  for (const button of controls.querySelectorAll("button[data-view]")) {
    button.addEventListener("click", () => {
      way = button.dataset.view;
      for (const other of controls.querySelectorAll("button[data-view]")) other.setAttribute("aria-pressed", other === button);
      draw();
    });
  }
  for (const button of controls.querySelectorAll("button[data-fold]")) {
    button.addEventListener("click", () => {
      closed.clear();
      if (button.dataset.fold === "close") for (const group of own.keys()) closed.add(group);
      draw();
    });
  }
  draw();
})();
