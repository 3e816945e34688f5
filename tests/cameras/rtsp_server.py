"""
An RTSP server with two cameras of different sizes, /a and /b: `/usr/bin/python3 rtsp_server.py PORT`. It needs
Debian's packages python3-gi, gir1.2-gst-rtsp-server-1.0, gstreamer1.0-plugins-base and gstreamer1.0-plugins-good.
`/usr/bin/python3 rtsp_server.py` alone says whether they are there, by its exit code.
"""

import sys

import gi

gi.require_version("Gst", "1.0")
gi.require_version("GstRtspServer", "1.0")
from gi.repository import GLib, Gst, GstRtspServer  # noqa: E402

CAMERAS = {"/a": (320, 240, "ball"), "/b": (176, 144, "snow")}

Gst.init(None)
if not all(Gst.ElementFactory.find(name) for name in ("videotestsrc", "jpegenc", "rtpjpegpay")):
    sys.exit("GStreamer's plugins are missing")
if len(sys.argv) > 1:
    server = GstRtspServer.RTSPServer()
    server.set_address("127.0.0.1")
    server.set_service(sys.argv[1])
    for path, (width, height, pattern) in CAMERAS.items():
        factory = GstRtspServer.RTSPMediaFactory()
        caps = f"video/x-raw,format=I420,width={width},height={height},framerate=10/1"
        factory.set_launch(
            f"( videotestsrc is-live=true pattern={pattern} ! {caps} ! jpegenc ! rtpjpegpay name=pay0 pt=26 )"
        )
        factory.set_shared(True)
        server.get_mount_points().add_factory(path, factory)
    server.attach(None)
    print("ready", flush=True)
    GLib.MainLoop().run()
