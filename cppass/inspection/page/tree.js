"use strict";
// The module tree, as the ARIA practices have it: arrow keys move, open and close; equal layers are one item until opened.

class ModuleTree {
  /** `choose(path)` is told of the chosen module; "" is the whole model. */
  constructor(box, choose) {
    this.box = box;
    this.choose = choose;
    box.addEventListener("keydown", (event) => this.key(event));
    box.addEventListener("click", (event) => this.click(event));
  }

  show(root, title) {
    this.roots = [{ module: root, label: title, level: 1, open: true, path: "" }];
    this.chosen = "";
    this.draw("");
  }

  /** Items in sight, in order. */
  visible(items = this.roots) {
    return items.flatMap((item) => [item, ...(item.open ? this.visible(this.children(item)) : [])]);
  }

  /** What is inside an item: modules, or the single layers of a folded one. */
  children(item) {
    if (!item.inside) {
      const { module, path, level } = item;
      const folded = module.same.length > 0 && !item.single;
      item.inside = folded
        ? module.same.map((own) => ({ module, label: own.slice(own.lastIndexOf(".") + 1), level: level + 1, path: own, single: true, parent: item }))
        : module.children.map((child) => this.item(child, module.path, path, level + 1, item));
    }
    return item.inside;
  }

  /** A child of a layer that stands for its equals has the path of that layer in front. */
  item(child, from, to, level, parent) {
    const path = from ? to + child.path.slice(from.length) : child.path;
    return { module: child, label: child.label, level, path, parent };
  }

  isOpenable(item) {
    return item.module.children.length > 0 || (item.module.same.length > 0 && !item.single);
  }

  draw(focus) {
    this.items = this.visible();
    this.box.replaceChildren(...this.items.map((item, index) => this.element(item, index)));
    if (focus !== undefined) this.roving(this.items.findIndex((item) => this.key_of(item) === focus));
  }

  key_of(item) {
    return item.single ? `${item.path}/` : item.path;
  }

  element(item, index) {
    const row = element("div", "item");
    row.setAttribute("role", "treeitem");
    row.setAttribute("aria-level", item.level);
    row.setAttribute("aria-selected", this.key_of(item) === this.chosen);
    row.tabIndex = -1;
    row.dataset.index = index;
    row.style.paddingLeft = `${8 + 14 * (item.level - 1)}px`;
    if (this.isOpenable(item)) row.setAttribute("aria-expanded", Boolean(item.open));
    row.append(element("span", "twist", this.isOpenable(item) ? (item.open ? "\u25be" : "\u25b8") : ""), element("span", "label", item.label || "model"));
    if (item.module.same.length && !item.single) row.append(element("span", "same", `${item.module.same.length} \u00d7 same`));
    if (item.module.type) row.append(element("span", "type", item.module.type));
    if (item.module.marks.refused) row.append(element("span", "alarm", "refused"));
    row.append(element("span", "nodes", item.module.nodes.toLocaleString("en")));
    return row;
  }

  click(event) {
    const row = event.target.closest(".item");
    if (!row) return;
    const item = this.items[row.dataset.index];
    if (this.isOpenable(item) && (event.target.classList.contains("twist") || this.key_of(item) === this.chosen)) item.open = !item.open;
    this.select(item);
    this.box.querySelector('[tabindex="0"]')?.focus();
  }

  select(item) {
    this.chosen = this.key_of(item);
    this.draw(this.chosen);
    this.choose(item.path);
  }

  /** Exactly one item can be tabbed to. */
  roving(index) {
    this.at = Math.max(0, Math.min(this.items.length - 1, index));
    for (const row of this.box.children) row.tabIndex = row.dataset.index === String(this.at) ? 0 : -1;
    return this.box.children[this.at];
  }

  key(event) {
    const item = this.items[this.at];
    const go = {
      ArrowDown: () => this.at + 1,
      ArrowUp: () => this.at - 1,
      Home: () => 0,
      End: () => this.items.length - 1,
      ArrowRight: () => this.right(item),
      ArrowLeft: () => this.left(item),
      Enter: () => this.select(item),
      " ": () => this.select(item),
    }[event.key];
    if (!go) return;
    event.preventDefault();
    const to = go();
    this.roving(to === undefined ? this.at : to).focus();
  }

  right(item) {
    if (!this.isOpenable(item)) return undefined;
    if (item.open) return this.at + 1;
    item.open = true;
    this.draw(this.key_of(item));
    return this.at;
  }

  left(item) {
    if (item.open && this.isOpenable(item)) {
      item.open = false;
      this.draw(this.key_of(item));
      return this.at;
    }
    return item.parent ? this.items.indexOf(item.parent) : undefined;
  }
}
