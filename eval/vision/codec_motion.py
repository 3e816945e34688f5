"""Motion vectors and packet sizes of an H.264 encoder, which cost a decoder nothing."""

import io
from collections.abc import Sequence

import av
import numpy as np
from av.codec.context import Flags2

ENCODER = {"preset": "veryfast", "crf": "23", "bf": "0", "g": "1000"}  # as a camera encodes: no look into the future
INTRA = 0.03  # a block without a motion vector counts as moved by this share of the width


def codec_motion(frames: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """
    Motion in a clip as its decoder sees it.

    Args:
        frames: T pictures, uint8 [H, W, 3]; an odd last row or column is left out.

    Returns:
        The mean displacement of each frame's pixels since the frame before, in widths of the picture, and each
        packet's bytes per pixel: float64 [T] each. Of the first frame, both are 0.
    """
    height, width = (size - size % 2 for size in frames[0].shape[:2])
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=30, options=ENCODER)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for picture in frames:
            picture = np.ascontiguousarray(picture[:height, :width])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    file.seek(0)
    displacement, sizes = [], []
    with av.open(file) as container:
        decoder = container.streams.video[0]
        decoder.codec_context.flags2 |= Flags2.export_mvs
        for packet in container.demux(decoder):
            sizes += [packet.size] * bool(packet.size)
            displacement += [mean_displacement(frame, width, height) for frame in packet.decode()]
    return np.array([0.0, *displacement[1:]]), np.array([0.0, *sizes[1:]]) / (height * width)


def mean_displacement(frame: av.VideoFrame, width: int, height: int) -> float:
    """The mean displacement of a frame's pixels, in widths."""
    vectors = [data.to_ndarray() for data in frame.side_data if data.type.name == "MOTION_VECTORS"]
    if not vectors:
        return INTRA
    found = vectors[0]
    pixels = found["w"].astype(float) * found["h"]
    length = np.hypot(found["motion_x"], found["motion_y"]) / found["motion_scale"]
    moved = (pixels * length).sum() / width + INTRA * max(0.0, height * width - pixels.sum())
    return float(moved / (height * width))
