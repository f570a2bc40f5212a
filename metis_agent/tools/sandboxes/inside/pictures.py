"""Images that the host brings, as Pillow images, and figures and images that the code shows.

Shown is what a notebook would show: a last expression, `display(...)`, an image's `show()`, `plt.show()`, and
figures that are open at the end of a call. All of it is optional: where Pillow or matplotlib is not installed, or
not imported by the code, nothing here imports it.
"""

import builtins
import importlib
import importlib.machinery
import sys
import types
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

from .wire import LONGEST_SIDE, Picture, unpack_picture

__all__ = ["Pictures", "flat_pixels"]

_MOST_NOTES = 20


class Pictures:
    """One session's; made before it, as the hooks that show images are the same in all."""

    def __init__(self) -> None:
        self._absent: dict[str, str] = {}
        self.begin()
        vars(builtins)["display"] = self._display
        _after_import({"PIL.Image": self._hook_pillow, "matplotlib.pyplot": self._hook_pyplot})

    def limit(self, most: int, pixels: int) -> None:
        """So many images a call may show, of so many pixels each; a larger one is made smaller."""
        self._most, self._pixels = most, pixels

    def begin(self) -> None:
        """Forget what an earlier call showed."""
        self.taken: list[Picture] = []
        """What this call showed so far."""
        self.notes: list[str] = []
        self._left_out = 0

    def place(self, names: MutableMapping[str, Any], name: str, mode: str, part: memoryview) -> None:
        """Bind a name to an image that the host sent; where that fails, calls that use the name say why."""
        self._absent.pop(name, None)
        try:
            width, height, pixels = unpack_picture(part)
            names[name] = importlib.import_module("PIL.Image").frombytes(mode, (width, height), pixels)
        except ImportError:
            self._absent[name] = f"{name} is not there: Pillow is not installed where this code runs."
        except MemoryError:
            self._absent[name] = f"{name} is not there: {width} x {height} pixels do not fit into the memory left."

    def did_not_fit(self) -> None:
        """For an image so large that not even its name could be read."""
        self._absent["image_"] = "An image is not there: it is more than fits into the memory that is left."

    def show(self, value: object) -> bool:
        """Take an image or a figure; whether it was one."""
        if isinstance(value, _class("PIL.Image", "Image")):
            self._take(lambda: value)
        elif isinstance(value, _class("matplotlib.figure", "Figure")):
            pyplot = sys.modules.get("matplotlib.pyplot")
            if pyplot is not None:
                # Else it would be shown again at the end of the call.
                pyplot.close(value)
            self._take(lambda: _drawn(value))
        else:
            return False
        return True

    def end(self, code: str) -> None:
        """Take the figures that are open, and say what became of the rest."""
        self._show_figures()
        if self._left_out:
            self._note(f"{self._left_out} more not shown: a call shows at most {self._most} images.")
        for name, why in self._absent.items():
            # The code may put the name together: f"image_{number}".
            if name.rstrip("0123456789") in code:
                self._note(why)

    def _take(self, make: Callable[[], Any]) -> None:
        if len(self.taken) >= self._most:
            self._left_out += 1
            return
        try:
            image = make()
            picture = flat_pixels(image, self._pixels)
        except BaseException as error:
            # The code's own images and figures can fail in any way, and memory can be short.
            self._note(f"An image can't be shown: {type(error).__name__}: {error}"[:500])
            return
        self.taken.append(picture)
        if picture[:2] != image.size:
            before, after = (f"{width} x {height}" for width, height in (image.size, picture[:2]))
            self._note(f"Image {len(self.taken)} is shown smaller than it is: {after} instead of {before} pixels.")

    def _note(self, text: str) -> None:
        if len(self.notes) < _MOST_NOTES:
            self.notes.append(" ".join(text.split()))

    def _show_figures(self) -> None:
        pyplot = sys.modules.get("matplotlib.pyplot")
        if pyplot is None:
            return
        try:
            figures = [pyplot.figure(number) for number in pyplot.get_fignums()]
        except BaseException:
            # The code may have put anything in pyplot's place.
            return
        for figure in figures:
            # One with nothing in it was begun, or is only the sum of what was closed.
            if getattr(figure, "axes", None) or getattr(figure, "texts", None):
                self.show(figure)

    def _display(self, *values: object, **_: object) -> None:
        """As in a notebook."""
        for value in values:
            if not self.show(value):
                print(value if isinstance(value, str) else repr(value))

    def _hook_pillow(self, module: Any) -> None:
        def show(image: object, title: object = None) -> None:
            self.show(image)

        module.Image.show = show

    def _hook_pyplot(self, module: Any) -> None:
        def show(*_: object, **__: object) -> None:
            self._show_figures()
            module.close("all")

        module.show = show


def flat_pixels(image: Any, pixels: int) -> Picture:
    """Return an image in RGB, on white where something shows through, of at most `pixels` pixels.

    Raises:
        ValueError: it has no pixels.
    """
    width, height = image.size
    if not (width and height):
        raise ValueError(f"it has {width} x {height} pixels")
    scale = min(1.0, (pixels / (width * height)) ** 0.5, LONGEST_SIDE / max(width, height))
    if image.mode.startswith("I"):  # 16 bits of grey; a plain conversion would cut them off
        image = image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        ground = importlib.import_module("PIL.Image").new("RGBA", image.size, "white")
        ground.alpha_composite(image)
        image = ground
    image = image.convert("RGB")
    if scale < 1.0:
        size = max(1, int(width * scale)), max(1, int(height * scale))
        image = image.resize(size, resample=1, reducing_gap=2.0)  # 1: LANCZOS
    return image.width, image.height, image.tobytes()


def _class(module: str, name: str) -> Any:
    """A class of a module that the code has imported; of another one, what nothing is an instance of."""
    return getattr(sys.modules.get(module), name, ())


def _drawn(figure: Any) -> Any:
    canvas = importlib.import_module("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
    canvas.draw()
    width, height = canvas.get_width_height()
    return importlib.import_module("PIL.Image").frombytes("RGBA", (width, height), bytes(canvas.buffer_rgba()))


class _Follower:
    """A finder that lets the others find, and calls `then` once a module of that name is there."""

    def __init__(self, then: Mapping[str, Callable[[Any], None]]) -> None:
        self._then = then

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        then = self._then.get(name)
        spec = importlib.machinery.PathFinder.find_spec(name, path, target) if then is not None else None
        loader: Any = spec.loader if spec is not None else None
        if loader is None or then is None:
            return None
        execute = loader.exec_module

        def execute_and_follow(module: types.ModuleType) -> None:
            execute(module)
            then(module)

        loader.exec_module = execute_and_follow
        return spec


def _after_import(then: Mapping[str, Callable[[Any], None]]) -> None:
    """Call a function on each of these modules: now, or when it is imported."""
    for name, follow in then.items():
        if name in sys.modules:
            follow(sys.modules[name])
    later = {name: follow for name, follow in then.items() if name not in sys.modules}
    sys.meta_path.insert(0, _Follower(later))
