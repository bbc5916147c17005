# ScheduleZero in a container, as a user without rights:
#
#   docker build -t schedulezero . && docker compose up -d && docker compose logs
#
# The first start prints an admin token: a login is always needed here. The server has to listen on
# every address of the container, so `allow_insecure` stands in for TLS; that is safe as long as
# the port is published to the host alone, as below, or to a proxy that speaks TLS. To serve other
# machines directly, mount tls_cert and tls_key and set SCHEDULEZERO_ALLOW_INSECURE=false.
#
# compose.yaml; ./config holds config.yaml and the Python files of your handlers:
#
#   services:
#     schedulezero:
#       image: schedulezero
#       ports: ["127.0.0.1:8888:8888"]
#       volumes: ["./config:/config:ro", "data:/data"]
#       environment: {TZ: Europe/Berlin}
#       restart: on-failure
#       stop_grace_period: 40s  # running jobs have 30 s to finish; with docker: stop -t 40
#       read_only: true
#       tmpfs: [/tmp, /logs]
#       cap_drop: [ALL]
#       security_opt: ["no-new-privileges:true"]
#   volumes:
#     data:
#
# Handlers in other containers: SCHEDULEZERO_ZMQ_HOST=0.0.0.0, and a key for each, which
# `docker compose exec schedulezero python -m schedulezero handler-key create ID` prints.

FROM python:3.13-slim
WORKDIR /app
COPY schedulezero.py handler.py LICENSE ./
RUN pip install --no-cache-dir --disable-pip-version-check --root-user-action=ignore \
        $(sed -n 's/^#   "\(.*\)",$/\1/p' schedulezero.py) \
    && python -m compileall -q schedulezero.py handler.py \
    && install -d -o 10001 -g 10001 -m 0700 /data /logs
COPY static static
COPY config.yaml /config/
ENV HOME=/data \
    MALLOC_ARENA_MAX=2 \
    MALLOC_TRIM_THRESHOLD_=131072 \
    SCHEDULEZERO_ALLOW_INSECURE=true \
    SCHEDULEZERO_CONFIG_PATH=/config/config.yaml \
    SCHEDULEZERO_DATA_DIR=/data \
    SCHEDULEZERO_HTTP_HOST=0.0.0.0 \
    SCHEDULEZERO_LOG_DIR=/logs \
    SCHEDULEZERO_LOG_TO=stdout
USER 10001:10001
VOLUME ["/data", "/logs"]
EXPOSE 8888
# What the program itself takes for its address, whatever the configuration says of port and TLS.
HEALTHCHECK --interval=60s --timeout=10s --start-period=60s \
    CMD ["python", "-c", "import os, schedulezero as s; raise SystemExit(s.fetch_health(s.load_config(None, os.environ)) != 200)"]
ENTRYPOINT ["python", "-m", "schedulezero"]
CMD ["run"]
