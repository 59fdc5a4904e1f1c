// A picture that tells where it is pointed at. Python draws it (png), this shows it and answers (at, step).
//
// at: [x, y], from 0 to 1, where the pointer is; step: [right, down, count], an arrow key. While Python draws, the
// latest place is kept and sent when the picture comes: no queue can grow.

const ARROWS = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] };

function render({ model, el }) {
  const picture = document.createElement("img");
  picture.className = "dynattn-turned";
  picture.draggable = false;
  picture.style.cssText = "max-width: 100%; touch-action: none; user-select: none; outline-offset: 2px";
  let waiting = false, next = null, address = null, presses = 0;

  const send = (name, value) => {
    waiting = true;
    model.set(name, value);
    model.save_changes();
  };
  const offer = (name, value) => (waiting ? (next = [name, value]) : send(name, value));

  const show = () => {
    if (address) URL.revokeObjectURL(address);
    address = URL.createObjectURL(new Blob([model.get("png")], { type: "image/png" }));
    picture.src = address;
    picture.alt = model.get("words");
    picture.dataset.drawn = model.get("drawn");
    waiting = false;
    if (next) {
      const [name, value] = next;
      next = null;
      send(name, value);
    }
  };
  const point = (event) => {
    const box = picture.getBoundingClientRect();
    offer("at", [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height]);
  };

  if (model.get("pointed")) {
    picture.tabIndex = 0;
    picture.style.cursor = "crosshair";
    picture.addEventListener("pointerdown", (event) => {
      picture.setPointerCapture(event.pointerId);
      picture.focus();
      point(event);
      event.preventDefault();
    });
    picture.addEventListener("pointermove", (event) => event.buttons && point(event));
    picture.addEventListener("keydown", (event) => {
      if (!(event.key in ARROWS)) return;
      offer("step", [...ARROWS[event.key], ++presses]);
      event.preventDefault();
      event.stopPropagation();
    });
  }
  model.on("change:drawn", show);
  el.appendChild(picture);
  show();
  return () => model.off("change:drawn", show);
}

export default { render };
