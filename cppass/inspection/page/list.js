"use strict";
// A list of any length: of its rows, only those in sight are elements. Arrow keys move the chosen row.

const ROW_HEIGHT = 26;
const ROWS_BEYOND = 12;

/** An element with a class and text; text is set as text, never read as markup. */
function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

class LongList {
  /** `draw(item)` makes the row of an item; `choose(item)` is told of the chosen one. */
  constructor(box, draw, choose) {
    this.box = box;
    this.draw = draw;
    this.choose = choose;
    this.items = [];
    this.chosen = -1;
    this.shown = new Map();
    this.spacer = element("div", "spacer");
    this.spacer.setAttribute("role", "presentation");
    box.append(this.spacer);
    box.addEventListener("scroll", () => this.paint(), { passive: true });
    box.addEventListener("keydown", (event) => this.key(event));
    new ResizeObserver(() => this.paint()).observe(box);
  }

  show(items) {
    this.items = items;
    this.chosen = -1;
    this.box.removeAttribute("aria-activedescendant");
    this.box.scrollTop = 0;
    this.spacer.style.height = `${items.length * ROW_HEIGHT}px`;
    this.clear();
    if (!items.length) this.spacer.append(element("p", "empty", "Nothing fits. Clear the search, or choose another module."));
    this.paint();
  }

  clear() {
    this.shown.clear();
    this.spacer.replaceChildren();
  }

  paint() {
    const first = Math.max(0, Math.floor(this.box.scrollTop / ROW_HEIGHT) - ROWS_BEYOND);
    const last = Math.min(this.items.length, Math.ceil((this.box.scrollTop + this.box.clientHeight) / ROW_HEIGHT) + ROWS_BEYOND);
    for (const [index, row] of this.shown) {
      if (index < first || index >= last) {
        row.remove();
        this.shown.delete(index);
      }
    }
    for (let index = first; index < last; index++) {
      if (!this.shown.has(index)) this.add(index);
    }
  }

  add(index) {
    const row = this.draw(this.items[index]);
    row.id = `row-${index}`;
    row.style.top = `${index * ROW_HEIGHT}px`;
    row.setAttribute("role", "option");
    row.setAttribute("aria-setsize", this.items.length);
    row.setAttribute("aria-posinset", index + 1);
    row.setAttribute("aria-selected", index === this.chosen);
    row.addEventListener("click", () => this.select(index));
    this.shown.set(index, row);
    this.spacer.append(row);
  }

  select(index) {
    if (!this.items.length) return;
    index = Math.max(0, Math.min(this.items.length - 1, index));
    this.shown.get(this.chosen)?.setAttribute("aria-selected", "false");
    this.chosen = index;
    this.reveal(index);
    this.shown.get(index).setAttribute("aria-selected", "true");
    this.box.setAttribute("aria-activedescendant", `row-${index}`);
    this.choose(this.items[index]);
  }

  reveal(index) {
    const top = index * ROW_HEIGHT;
    if (top < this.box.scrollTop) this.box.scrollTop = top;
    const below = top + ROW_HEIGHT - this.box.clientHeight;
    if (below > this.box.scrollTop) this.box.scrollTop = below;
    this.paint();
  }

  key(event) {
    const page = Math.max(1, Math.floor(this.box.clientHeight / ROW_HEIGHT) - 1);
    const moves = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity };
    if (!(event.key in moves)) return;
    event.preventDefault();
    const move = moves[event.key];
    this.select(this.chosen < 0 && Number.isFinite(move) ? 0 : this.chosen + move);
  }
}
