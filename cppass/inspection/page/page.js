"use strict";
// The page: theme, which graph is shown, search, and what is known of the chosen node.

const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const FIELDS = ["name", "op", "shape", "dtype", "call", "kind", "state", "module", "where", "role", "inputs"];
const NUMBERED = new Set(["op", "shape", "dtype", "kind", "state", "module", "where", "role"]);

/** Rows of numbers and text -> nodes with names for their fields, each with the nodes that read it. */
function nodesOf(rows) {
  const nodes = rows.map((row, index) => {
    const node = { index, users: [] };
    FIELDS.forEach((field, i) => { node[field] = NUMBERED.has(field) ? data.texts[row[i]] : row[i]; });
    return node;
  });
  for (const node of nodes) for (const input of node.inputs) nodes[input].users.push(node.index);
  return nodes;
}

const graphs = data.graphs.map((g) => ({ ...g, before: nodesOf(g.before), after: nodesOf(g.after) }));
const state = { graph: data.main, view: "nodes", module: "", words: [], kind: "", only: false, weights: false };

/** What is searched of a node; made when it is first asked for. */
function haystack(node) {
  node.text ??= `${node.name} ${node.op} ${node.shape} ${node.module} ${node.state} ${node.role} ${node.where}`.toLowerCase();
  return node.text;
}

function fits(node) {
  if (state.module && node.module !== state.module && !node.module.startsWith(`${state.module}.`)) return false;
  if (state.kind && node.kind !== state.kind) return false;
  return state.words.every((word) => haystack(node).includes(word));
}

function isChanged(before, after) {
  return !before || !after || before.shape !== after.shape || before.op !== after.op;
}

/** Weights and buffers: as many as there are ops, and seldom looked for. */
function isWeight(node) {
  return node.op === "input" && node.module !== "";
}

/** What the view has: nodes, or pairs of them. */
function everything() {
  const graph = graphs[state.graph];
  if (state.view !== "rows") return (state.view === "after" ? graph.after : graph.before).filter((n) => state.weights || !isWeight(n));
  return graph.rows
    .map(([b, a]) => ({ before: b === null ? null : graph.before[b], after: a === null ? null : graph.after[a] }))
    .filter(({ before, after }) => state.weights || !isWeight(before ?? after));
}

/** Whether the list shows it. */
function isWanted(item) {
  if (state.view !== "rows") return fits(item);
  const { before, after } = item;
  return ((before && fits(before)) || (after && fits(after))) && (!state.only || isChanged(before, after));
}

function line(node, into) {
  const text = element("span", "text");
  if (node.op !== "output") text.append(element("span", "name", node.name), element("span", "shape", node.shape), " = ");
  text.append(node.op === "output" ? `return ${node.call}` : node.call);
  into.append(text);
}

function drawNode(node) {
  const row = element("div", "row");
  row.append(element("span", `state ${node.kind}`, node.kind));
  line(node, row);
  if (node.role) row.append(element("span", `role ${node.role}`, node.role));
  if (node.module) row.append(element("span", "place", node.module));
  return row;
}

function drawPair({ before, after }) {
  const row = element("div", "row pair");
  for (const [node, other, alone] of [[before, after, "gone"], [after, before, "new"]]) {
    const kind = !node ? "none" : !other ? alone : isChanged(before, after) ? "changed" : "";
    const cell = element("div", `cell ${kind}`);
    if (node) line(node, cell);
    row.append(cell);
  }
  return row;
}

function fact(list, title, ...values) {
  const shown = element("dd");
  shown.append(...values);
  list.append(element("dt", "", title), shown);
}

/** Links to other nodes of the same graph. */
function links(indices, nodes) {
  const made = indices.slice(0, 40).map((index) => {
    const link = element("button", "link", nodes[index].name);
    link.type = "button";
    link.addEventListener("click", () => reveal(nodes[index].name));
    return link;
  });
  return indices.length > 40 ? [...made, `and ${indices.length - 40} more`] : made.length ? made : ["none"];
}

function detail(item) {
  const isPair = state.view === "rows";
  const node = isPair ? item.after ?? item.before : item;
  const graph = graphs[state.graph];
  const nodes = isPair ? (item.after ? graph.after : graph.before) : state.view === "after" ? graph.after : graph.before;
  const facts = element("dl", "facts");
  for (const [title, own] of isPair ? [["before", item.before], ["after", item.after]] : [["node", node]]) {
    if (!own) continue;
    const code = element("code", "");
    line(own, code);
    fact(facts, title, code);
  }
  fact(facts, "rows", element("span", `state ${node.kind}`, node.kind), ` ${node.state}: ${data.kinds[node.kind]}`);
  if (node.role) fact(facts, "role", node.role);
  if (node.dtype) fact(facts, "type", node.dtype);
  if (node.module) fact(facts, "module", element("code", "", node.module));
  if (node.where) fact(facts, "source", element("code", "source", node.where));
  fact(facts, "reads", ...links(node.inputs, nodes));
  fact(facts, "read by", ...links(node.users, nodes));
  $("detail").replaceChildren(facts);
}

const list = new LongList($("list"), (item) => (state.view === "rows" ? drawPair(item) : drawNode(item)), detail);
const tree = new ModuleTree($("tree"), (path) => { state.module = path; refresh(); });

function refresh() {
  const possible = everything();
  const found = possible.filter(isWanted);
  list.show(found);
  const all = possible.length;
  const noun = state.view === "rows" ? "rows" : "nodes";
  const many = (n) => n.toLocaleString("en");
  $("count").textContent = found.length === all ? `${many(all)} ${noun}` : `${many(found.length)} of ${many(all)} ${noun}`;
}

function view(name) {
  state.view = name;
  for (const tab of document.querySelectorAll('[role="tab"]')) {
    const chosen = tab.id === `tab-${name}`;
    tab.setAttribute("aria-selected", chosen);
    tab.tabIndex = chosen ? 0 : -1;
  }
  $("only-label").hidden = name !== "rows";
  $("list").setAttribute("aria-label", name === "rows" ? "Graph before and after" : "Nodes");
  refresh();
}

/** Show a node of this graph, whatever was searched for. */
function reveal(name) {
  const graph = graphs[state.graph];
  if (state.view === "rows" || !graph[state.view === "after" ? "after" : "before"].some((n) => n.name === name)) view("nodes");
  const node = [...graph.before, ...graph.after].find((n) => n.name === name);
  Object.assign(state, { words: [], kind: "", module: "", weights: state.weights || Boolean(node && isWeight(node)) });
  $("weights").checked = state.weights;
  $("search").value = "";
  $("kind").value = "";
  tree.show(graph.tree, "model");
  refresh();
  const at = list.items.findIndex((node) => node.name === name);
  if (at < 0) return;
  list.select(at);
  $("list").focus();
}

function show(index) {
  state.graph = index;
  state.module = "";
  for (const part of document.querySelectorAll(".graph")) part.hidden = part.dataset.graph !== String(index);
  const isRewritten = graphs[index].after.length > 0;
  for (const id of ["tab-after", "tab-rows"]) $(id).disabled = !isRewritten;
  tree.show(graphs[index].tree, "model");
  view("nodes");
}

function theme(isDark) {
  document.documentElement.dataset.theme = isDark ? "dark" : "light";
  $("theme").setAttribute("aria-pressed", isDark);
}

function later(run) {
  let timer = 0;
  return () => { clearTimeout(timer); timer = setTimeout(run, 60); };
}

$("search").addEventListener("input", later(() => {
  state.words = $("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  refresh();
}));
$("search").addEventListener("keydown", (event) => {
  if (event.key === "ArrowDown" || event.key === "Enter") { event.preventDefault(); $("list").focus(); list.select(0); }
  if (event.key === "Escape") { $("search").value = ""; state.words = []; refresh(); $("list").focus(); }
});
$("kind").addEventListener("change", () => { state.kind = $("kind").value; refresh(); });
$("weights").addEventListener("change", () => { state.weights = $("weights").checked; refresh(); });
$("only").addEventListener("change", () => { state.only = $("only").checked; refresh(); });
$("graph")?.addEventListener("change", () => show(Number($("graph").value)));
$("theme").addEventListener("click", () => theme(document.documentElement.dataset.theme !== "dark"));
for (const tab of document.querySelectorAll('[role="tab"]')) {
  tab.addEventListener("click", () => view(tab.id.slice("tab-".length)));
  tab.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const tabs = [...document.querySelectorAll('[role="tab"]:not(:disabled)')];
    const next = tabs[(tabs.indexOf(tab) + step + tabs.length) % tabs.length];
    view(next.id.slice("tab-".length));
    next.focus();
  });
}
document.addEventListener("click", (event) => {
  const link = event.target.closest("[data-node]");
  if (!link) return;
  reveal(link.dataset.node);
  $("explorer").scrollIntoView({ block: "start" });
});
document.addEventListener("keydown", (event) => {
  const isTyping = event.target.matches("input, select, textarea");
  if (event.key !== "/" || isTyping || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  $("search").focus();
  $("search").select();
});

const dark = matchMedia("(prefers-color-scheme: dark)");
theme(dark.matches);
dark.addEventListener("change", (event) => theme(event.matches));
show(state.graph);
